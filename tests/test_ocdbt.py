"""The container that we write by hand, read by TensorStore."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from offstep._native import crc32c
from offstep.formats.ocdbt import Entry, SlotRange, encode_database, prepare_database

DATA_FILE = "d/" + "0123456789abcdef" * 2
UUID = bytes(range(16))


def write_database(directory: Path, entries: Sequence[Entry], values: bytes, max_node_bytes: int = 100_000_000) -> None:
    nodes, manifest = encode_database(
        entries,
        data_file=DATA_FILE,
        node_offset=len(values),
        uuid=UUID,
        commit_time_ns=1_700_000_000_123_456_789,
        crc32c=crc32c,
        max_node_bytes=max_node_bytes,
    )
    (directory / "d").mkdir(exist_ok=True)
    (directory / DATA_FILE).write_bytes(values + nodes)
    (directory / "manifest.ocdbt").write_bytes(manifest)


def open_store(directory: Path) -> ts.KvStore:
    return ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}}).result()


def read_database(directory: Path) -> dict[bytes, bytes]:
    store = open_store(directory)
    return {key: store.read(key).result().value for key in store.list().result()}


def refer(values: dict[bytes, bytes]) -> tuple[list[Entry], bytes]:
    """Puts all values out of line, one after another with a gap before each."""
    entries: list[Entry] = []
    blob = b""
    for key in sorted(values):
        blob += b"gap"
        entries.append((key, SlotRange(len(blob), len(values[key]))))
        blob += values[key]
    return entries, blob


def test_tensorstore_reads_inline_and_referred_values(tmp_path: Path) -> None:
    entries: list[Entry] = [(b"a/c/0", SlotRange(5, 3)), (b"a/zarr.json", b"{}"), (b"b/c", SlotRange(0, 5))]
    write_database(tmp_path, entries, b"valueabc")
    assert read_database(tmp_path) == {b"a/c/0": b"abc", b"a/zarr.json": b"{}", b"b/c": b"value"}


def test_inline_values_may_be_longer_than_the_configured_limit(tmp_path: Path) -> None:
    write_database(tmp_path, [(b"a", b"x" * 5000), (b"b", b"")], b"")
    assert read_database(tmp_path) == {b"a": b"x" * 5000, b"b": b""}


@settings(deadline=None, max_examples=40)
@given(
    values=st.dictionaries(st.binary(min_size=1, max_size=20), st.binary(max_size=300), min_size=1, max_size=40),
    max_node_bytes=st.sampled_from([1, 200, 1000, 100_000_000]),
)
def test_tensorstore_reads_any_database_at_any_node_size(
    tmp_path_factory: pytest.TempPathFactory, values: dict[bytes, bytes], max_node_bytes: int
) -> None:
    directory = tmp_path_factory.mktemp("database")
    entries, blob = refer(values)
    write_database(directory, entries, blob, max_node_bytes)
    assert read_database(directory) == values


def test_many_entries_become_a_tree_of_several_levels(tmp_path: Path) -> None:
    values = {f"layer{i}/kernel/c/0".encode(): f"value {i}".encode() for i in range(1000)}
    entries, blob = refer(values)
    nodes = prepare_database(entries, node_offset=len(blob), max_node_bytes=1000).nodes
    write_database(tmp_path, entries, blob, max_node_bytes=1000)
    assert nodes[-1].height >= 2
    assert max(node.size for node in nodes) <= 1100
    assert nodes[-1].key_count == 1000
    assert read_database(tmp_path) == values


def test_tensorstore_can_go_on_writing_a_database_of_ours(tmp_path: Path) -> None:
    values = {f"key{i:04}".encode(): b"value" for i in range(500)}
    entries, blob = refer(values)
    write_database(tmp_path, entries, blob, max_node_bytes=1000)
    store = open_store(tmp_path)
    store["key0250"] = b"other"
    del store["key0499"]
    expected = values | {b"key0250": b"other"}
    del expected[b"key0499"]
    assert read_database(tmp_path) == expected


def test_a_range_of_keys_can_be_listed(tmp_path: Path) -> None:
    values = {f"key{i:04}".encode(): b"value" for i in range(500)}
    entries, blob = refer(values)
    write_database(tmp_path, entries, blob, max_node_bytes=1000)
    listed = open_store(tmp_path).list(ts.KvStore.KeyRange("key0100", "key0200")).result()
    assert sorted(listed) == sorted(values)[100:200]


def test_the_prepared_form_gives_the_same_bytes_for_every_save() -> None:
    entries: list[Entry] = [(b"a", SlotRange(0, 4)), (b"b", b"inline")]
    database = prepare_database(entries, node_offset=4)
    for second in range(2):
        data_file, now_ns = f"d/{second:032x}", 1_700_000_000_000_000_000 + second
        parts, manifest = database.encode(data_file=data_file, uuid=UUID, commit_time_ns=now_ns, crc32c=crc32c)
        expected = encode_database(
            entries, data_file=data_file, node_offset=4, uuid=UUID, commit_time_ns=now_ns, crc32c=crc32c
        )
        assert (b"".join(parts), manifest) == expected


def test_every_flipped_bit_of_node_and_manifest_is_refused(tmp_path: Path) -> None:
    values = b"12345678"
    write_database(tmp_path, [(b"a/c/0", SlotRange(0, 8)), (b"a/zarr.json", b'{"zarr_format": 3}')], values)
    for name, start in (("manifest.ocdbt", 0), (DATA_FILE, len(values))):
        original = (tmp_path / name).read_bytes()
        for position in range(start, len(original)):
            flipped = bytearray(original)
            flipped[position] ^= 1 << position % 8
            (tmp_path / name).write_bytes(flipped)
            with pytest.raises(ValueError, match=r"DATA_LOSS|FAILED_PRECONDITION|INVALID_ARGUMENT|OUT_OF_RANGE|Error"):
                read_database(tmp_path)
        (tmp_path / name).write_bytes(original)
    assert read_database(tmp_path)[b"a/c/0"] == values


@pytest.mark.parametrize("keys", [[b"b", b"a"], [b"a", b"a"]])
def test_keys_out_of_order_are_refused(keys: list[bytes]) -> None:
    with pytest.raises(ValueError, match=r"OCDBT keys must ascend: b'.' stands before b'a'"):
        prepare_database([(key, b"") for key in keys], node_offset=0)


def test_a_database_without_entries_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one entry"):
        prepare_database([], node_offset=0)


def test_a_data_file_name_of_another_length_is_refused() -> None:
    database = prepare_database([(b"a", b"")], node_offset=0)
    with pytest.raises(ValueError, match="expected 34"):
        database.encode(data_file="d/short", uuid=UUID, commit_time_ns=0, crc32c=crc32c)
