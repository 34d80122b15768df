"""HDF5's own checksums in a file that is put together by hand: h5py reads all values, and refuses flipped bits."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hdf5_skeleton import DTYPES, random_bytes

from offstep._native import crc32c, fletcher32
from offstep.cli import main
from offstep.errors import CheckpointDamaged
from offstep.formats.file_manifest import find_fault
from offstep.formats.hdf5_checked import add_checksums, make_checked_skeleton
from offstep.formats.hdf5_checksums import ArrayChecksums, lookup3
from offstep.formats.hdf5_skeleton import Dataset, count_bytes
from offstep.formats.keras_reader import KerasReader
from offstep.stored import Region

Groups = Mapping[str, Mapping[str, str]]


def assemble(datasets: Sequence[Dataset], groups: Groups, *, piece_bytes: int = 256) -> bytes:
    """Returns a whole file; each dataset has its random bytes."""
    slot_bytes = max((dataset.offset + count_bytes(dataset) + 4 for dataset in datasets), default=0)
    slot = bytearray(slot_bytes)
    for number, dataset in enumerate(datasets):
        slot[dataset.offset : dataset.offset + count_bytes(dataset)] = random_bytes(dataset, number)
    skeleton = make_checked_skeleton(datasets, groups)
    head = skeleton.encode(data_at=len(skeleton.image) + 100, data_bytes=len(slot))
    head = skeleton.put_scalars(head, memoryview(slot))
    checksums, crc = ArrayChecksums(memoryview(slot), skeleton.list_arrays()), crc32c(head)
    for start in range(0, len(slot), piece_bytes):
        crc = checksums.extend(memoryview(slot)[start : start + piece_bytes], crc)
    assert crc == crc32c(head + slot)
    return head + bytes(slot)


def place(arrays: Sequence[tuple[str, Sequence[int]]]) -> list[Dataset]:
    datasets: list[Dataset] = []
    for number, (dtype, shape) in enumerate(arrays):
        offset = -(-(datasets[-1].offset + count_bytes(datasets[-1]) + 4) // 64) * 64 if datasets else 0
        datasets.append(Dataset(f"layers/layer_{number // 3}/vars/{number}", tuple(shape), dtype, offset))
    return datasets


def read(content: bytes) -> dict[str, Any]:
    """Returns all values and attributes, by path."""
    found: dict[str, Any] = {}
    with h5py.File(io.BytesIO(content)) as file:

        def visit(path: str, node: Any) -> None:  # a group or dataset of h5py
            value = (node.dtype, node.shape, node[()].tobytes()) if isinstance(node, h5py.Dataset) else None
            found[path] = value, dict(node.attrs)

        file.visititems(visit)
    return found


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3)), max_size=30),
    st.sampled_from([2, 64, 4096]),
)
def test_every_array_is_read_from_where_it_was_put(arrays: list[tuple[str, list[int]]], piece_bytes: int) -> None:
    datasets = place(arrays)
    found = read(assemble(datasets, {"layers/none/vars": {"name": "ebene_ü"}}, piece_bytes=piece_bytes))
    for number, dataset in enumerate(datasets):
        (_, *value), attributes = found[dataset.path]
        assert value == [dataset.shape, random_bytes(dataset, number)]
        assert attributes == ({"dtype": "bfloat16"} if dataset.dtype == "bfloat16" else {})
    assert found["layers/none/vars"][1] == {"name": "ebene_ü"}


def test_flipped_bits_are_refused_or_change_no_value() -> None:
    """Texts of attributes are all that has no checksum: HDF5 keeps them elsewhere, in a global heap."""
    content = assemble(place([("float32", (17, 9)), ("float32", (9,)), ("int32", ())] * 4), {"vars": {"name": "dense"}})
    whole = {path: value for path, (value, _) in read(content).items()}
    chance, refused = Random(0), 0
    places = [*range(len(content) - 5_000, len(content)), *(chance.randrange(len(content)) for _ in range(200))]
    for at in chance.sample(places, 300):
        damaged = bytearray(content)
        damaged[at] ^= 1 << chance.randrange(8)
        try:
            found = read(bytes(damaged))
        except Exception:  # noqa: BLE001  whatever h5py raises: it is refused
            refused += 1
        else:
            assert {path: value for path, (value, _) in found.items()} == whole, at
    assert refused > 100


def test_a_file_with_many_members_of_a_group_is_read_back() -> None:
    datasets = [Dataset(f"layers/dense_{n}/vars/0", (3,), "float32", 64 * n) for n in range(1000)]
    found = read(assemble(datasets, {}))
    assert all(found[each.path][0][2] == random_bytes(each, n) for n, each in enumerate(datasets))


def test_checksums_are_added_to_a_file_of_others() -> None:
    source = io.BytesIO()
    with h5py.File(source, "w") as file:
        file["layers/a/vars/0"] = np.arange(12, dtype="f4").reshape(3, 4)
        file["optimizer/vars/0"] = np.int64(7)
        file["none"] = np.zeros((0, 2), "f2")
        brief = file.create_dataset("brief", data=np.arange(3, dtype="u2").view("V2"))
        brief.attrs["dtype"] = "bfloat16"
        file["layers/a"].attrs["name"] = "a"
    content = add_checksums(source.getvalue())
    assert read(content) == read(source.getvalue())
    with h5py.File(io.BytesIO(content)) as file:
        assert file["layers/a/vars/0"].fletcher32


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400), st.integers(1, 400), st.integers(0, 200))
def test_fletcher32_is_that_of_hdf5(pattern: bytes, repeats: int, first: int) -> None:
    data = (pattern or b"\xff") * repeats
    with h5py.File(io.BytesIO(), "w") as file:
        made = file.create_dataset("x", data=np.frombuffer(data, "u1"), chunks=(len(data),), fletcher32=True)
        expected = int.from_bytes(made.id.read_direct_chunk((0,))[1][-4:], "little")
    assert fletcher32(data) == expected
    cut = min(2 * first, len(data))
    assert fletcher32(data[cut:], fletcher32(data[:cut])) == expected


def test_lookup3_is_that_of_hdf5() -> None:
    with h5py.File("x", "w", driver="core", backing_store=False, libver="v110") as file:
        file.flush()
        image = file.id.get_file_image()
    assert lookup3(image[:44]) == int.from_bytes(image[44:48], "little")
    assert lookup3(b"") == 0xDEADBEEF  # as in lookup3.c
    assert lookup3(b"Four score and seven years ago") == 0x17770551


def test_our_reader_reads_values_and_parts_of_them_where_they_lie(tmp_path: Path) -> None:
    datasets = place([("float32", (6, 4, 3)), ("bfloat16", (5,)), ("int64", ()), ("float64", (0, 2))])
    path = tmp_path / "m.weights.h5"
    path.write_bytes(assemble(datasets, {}))
    reader = KerasReader(path)
    leaves = {leaf.name: leaf for leaf in reader.contents.leaves}
    for number, dataset in enumerate(datasets):
        [value] = reader.read([Region(leaves[dataset.path])], 1)
        assert value.tobytes() == random_bytes(dataset, number)
    leaf = leaves[datasets[0].path]
    whole = np.frombuffer(random_bytes(datasets[0], 0), "f4").reshape(6, 4, 3)
    rows, columns = [(0, 6), (2, 5), (2, 3)], [(0, 4), (1, 3), (2, 3)]
    for span in product(rows, columns, [(0, 3), (0, 2)]):
        [value] = reader.read([Region(leaf, span)], 1)
        assert value.tobytes() == whole[tuple(slice(*bounds) for bounds in span)].tobytes()
    reader.verify(list(leaves.values()), 1)
    reader.close()
    content = bytearray(path.read_bytes())
    content[content.index(whole.tobytes())] ^= 1
    path.write_bytes(content)
    reader = KerasReader(path)
    with pytest.raises(CheckpointDamaged, match="restore another checkpoint"):
        reader.verify([leaf], 1)
    reader.close()


def test_a_mean_of_files_has_checksums_too(tmp_path: Path) -> None:
    datasets = place([("float32", (40, 5)), ("float32", (3,)), ("int64", ())])
    for name in ("a", "b"):
        (tmp_path / f"{name}.weights.h5").write_bytes(assemble(datasets, {}))
    target = tmp_path / "mean.weights.h5"
    assert main(["average", str(tmp_path / "a.weights.h5"), str(tmp_path / "b.weights.h5"), str(target)]) == 0
    with h5py.File(target) as file:
        assert file[datasets[0].path].fletcher32
        expected = np.frombuffer(random_bytes(datasets[0], 0), "f4").reshape(40, 5)
        assert np.array_equal(file[datasets[0].path][()], expected, equal_nan=True)


def test_a_file_that_lost_its_manifest_to_damage_is_told_by_its_end(tmp_path: Path) -> None:
    path = tmp_path / "m.weights.h5"
    path.write_bytes(assemble(place([("float32", (3,))]), {}))
    assert find_fault(path) is None
    path.write_bytes(path.read_bytes() + b"x" * 7)
    assert find_fault(path) == "7 bytes after its end that are no manifest"


def test_too_little_room_for_the_metadata_is_refused() -> None:
    skeleton = make_checked_skeleton([Dataset("a", (1,), "float32", 0)], {})
    with pytest.raises(ValueError, match="the metadata take"):
        skeleton.encode(data_at=100, data_bytes=8)
