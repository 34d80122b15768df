"""The index of a database, decoded: of ours, of TensorStore's, and of damaged ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ocdbt import DATA_FILE, refer, write_database

from offstep.errors import CheckpointDamaged
from offstep.formats.ocdbt_index import FileRange, Index, UnknownLayout, read_index


def resolve(directory: Path, index: Index) -> dict[bytes, bytes]:
    return {key: resolve_value(directory, value) for key, value in index.items()}


def resolve_value(directory: Path, value: bytes | FileRange) -> bytes:
    if isinstance(value, bytes):
        return value
    return (directory / value.file).read_bytes()[value.offset : value.offset + value.size]


@settings(deadline=None, max_examples=60)
@given(
    values=st.dictionaries(st.binary(min_size=1, max_size=20), st.binary(max_size=300), min_size=1, max_size=40),
    max_node_bytes=st.sampled_from([1, 200, 1000, 100_000_000]),
)
def test_any_database_of_ours_is_decoded(
    tmp_path_factory: pytest.TempPathFactory, values: dict[bytes, bytes], max_node_bytes: int
) -> None:
    directory = tmp_path_factory.mktemp("database")
    entries, blob = refer(values)
    write_database(directory, entries, blob, max_node_bytes)
    index = read_index(directory)
    assert list(index) == sorted(values)
    assert resolve(directory, index) == values


def test_values_in_nodes_are_decoded(tmp_path: Path) -> None:
    write_database(tmp_path, [(b"a", b"x" * 5000), (b"b", b"")], b"")
    assert read_index(tmp_path) == {b"a": b"x" * 5000, b"b": b""}


def write_with_tensorstore(directory: Path, config: dict[str, object], generations: int = 1) -> dict[bytes, bytes]:
    spec = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{directory}/"},
        "config": {"max_inline_value_bytes": 10, **config},
    }
    store = ts.KvStore.open(spec).result()
    values: dict[bytes, bytes] = {}
    for generation in range(generations):
        new = {b"key/%04d" % number: b"%d" % generation * (number % 40) for number in range(generation, 600)}
        with ts.Transaction() as transaction:
            for key, value in new.items():
                store.with_transaction(transaction)[key] = value
        values |= new
    return values


@pytest.mark.parametrize("max_node_bytes", [2000, 100_000_000])
@pytest.mark.parametrize("generations", [1, 3])
def test_what_tensorstore_wrote_is_decoded(tmp_path: Path, max_node_bytes: int, generations: int) -> None:
    config = {"compression": None, "max_decoded_node_bytes": max_node_bytes}
    values = write_with_tensorstore(tmp_path, config, generations)
    assert resolve(tmp_path, read_index(tmp_path)) == values


@pytest.mark.parametrize(
    "config", [{"compression": {"id": "zstd"}}, {"compression": None, "manifest_kind": "numbered"}]
)
def test_what_is_not_decoded_is_left_to_tensorstore(tmp_path: Path, config: dict[str, object]) -> None:
    write_with_tensorstore(tmp_path, config)
    with pytest.raises(UnknownLayout):
        read_index(tmp_path)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("database")
    entries, blob = refer({b"k%02d" % number: b"v" * number for number in range(40)})
    write_database(directory, entries, blob, 300)
    return directory


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_flipped_bit_is_refused_or_changes_nothing(database: Path, data: st.DataObject) -> None:
    expected = read_index(database)
    path = database / data.draw(st.sampled_from(["manifest.ocdbt", DATA_FILE]))
    original = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(original) - 1))
    damaged = bytearray(original)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        assert read_index(database) == expected
    except (CheckpointDamaged, UnknownLayout):
        pass
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("name", ["manifest.ocdbt", DATA_FILE])
@pytest.mark.parametrize("kept", [0, 1, 20, -1])
def test_a_truncated_index_is_refused(tmp_path: Path, name: str, kept: int) -> None:
    write_database(tmp_path, [(b"a", b"value")], b"")
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointDamaged, match="restore another checkpoint"):
        read_index(tmp_path)


@pytest.mark.parametrize("name", ["manifest.ocdbt", DATA_FILE])
def test_a_missing_file_is_told(tmp_path: Path, name: str) -> None:
    write_database(tmp_path, [(b"a", b"value")], b"")
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointDamaged, match=f"{name} is missing"):
        read_index(tmp_path)
