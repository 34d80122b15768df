"""Arrays read back: whole and in part, straight from the file or through TensorStore, equal either way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slots import example_arrays, lay_out, save, save_arrays

from offstep.errors import CheckpointDamaged
from offstep.formats.orbax_reader import OrbaxReader
from offstep.stored import Region, StoredLeaf


def read_all(reader: OrbaxReader, threads: int = 2) -> dict[Any, np.ndarray]:
    regions = [Region(leaf) for leaf in reader.contents.leaves]
    return {region.leaf.path: array for region, array in zip(regions, reader.read(regions, threads), strict=True)}


@pytest.mark.parametrize("threads", [1, 3])
def test_all_arrays_are_read(tmp_path: Path, threads: int) -> None:
    arrays = example_arrays() | {
        ("complex",): np.array([1 + 2j]),
        ("narrow",): np.array([1, -2], ml_dtypes.int4),
        ("flags", 0): np.array([[True, False]]),
    }
    reader = OrbaxReader(save_arrays(tmp_path, 1, arrays))
    assert reader.is_direct
    found = read_all(reader, threads)
    reader.close()
    assert found.keys() == arrays.keys()
    for path, array in arrays.items():
        assert (found[path].dtype, found[path].shape) == (array.dtype, array.shape)
        assert found[path].tobytes() == array.tobytes()
        assert found[path].flags.c_contiguous


@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_any_part_of_a_chunked_array_is_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 7), max_size=3)))
    chunk_shape = tuple(data.draw(st.integers(1, size)) for size in shape)
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    spans = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        spans.append((start, data.draw(st.integers(start + 1, size))))
    plan, slot = lay_out({("w",): array}, {("w",): chunk_shape})
    reader = OrbaxReader(save(tmp_path_factory.mktemp("part"), 1, plan, slot))
    [leaf] = reader.contents.leaves
    part, copy = reader.read([Region(leaf, tuple(spans)), Region(leaf)], 2)
    reader.verify([leaf], 2)
    checked_part, checked = reader.read([Region(leaf, tuple(spans)), Region(leaf)], 2)
    reader.close()
    assert (checked_part.tobytes(), checked.tobytes()) == (part.tobytes(), copy.tobytes())
    assert np.array_equal(part, array[tuple(slice(*span) for span in spans)])
    assert np.array_equal(copy, array)


def test_whole_arrays_are_aligned_in_memory(tmp_path: Path) -> None:
    reader = OrbaxReader(save_arrays(tmp_path, 1, {("a",): np.ones(3), ("b",): np.ones((100, 70))}))
    found = read_all(reader)
    reader.close()
    assert found["a",].tolist() == [1, 1, 1]
    assert found["b",].ctypes.data % 8 == 0


def test_stock_arrays_go_through_tensorstore(tmp_path: Path) -> None:
    tree = {"w": jnp.arange(60.0).reshape(6, 10), "n": jnp.int32(3)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "stock", tree)
    reader = OrbaxReader(tmp_path / "stock")
    assert not reader.is_direct
    [leaf] = [leaf for leaf in reader.contents.leaves if leaf.path == ("w",)]
    assert leaf == StoredLeaf(("w",), (6, 10), "float32")
    [part] = reader.read([Region(leaf, ((1, 3), (4, 10)))], 2)
    assert np.array_equal(part, np.arange(60.0).reshape(6, 10)[1:3, 4:10])
    reader.verify(reader.contents.leaves, 2)
    reader.close()


@pytest.mark.parametrize("offset", [0, 5, 23, 24, 27])
@pytest.mark.parametrize("chunk_rows", [2, 4])
def test_a_flipped_bit_in_any_chunk_names_the_leaf(tmp_path: Path, offset: int, chunk_rows: int) -> None:
    plan, slot = lay_out({("w",): np.arange(3 * 2 * 4, dtype=np.int8).reshape(6, 4)}, {("w",): (chunk_rows, 4)})
    if offset >= chunk_rows * 4 + 4:
        offset = chunk_rows * 4 + 3  # the last byte of the checksum
    slot[offset] ^= 1
    reader = OrbaxReader(save(tmp_path, 1, plan, slot))
    with pytest.raises(CheckpointDamaged, match=r"^w: its checksum is wrong"):
        reader.verify(reader.contents.leaves, 2)
    with pytest.raises(CheckpointDamaged, match=r"^w: its checksum is wrong"):
        read_all(reader)
    reader.close()


def test_a_leaf_without_its_chunk_is_damaged(tmp_path: Path) -> None:
    step = save_arrays(tmp_path, 1, {("a",): np.ones(2), ("b",): np.ones(3)})
    metadata = step / "pytree/_METADATA"
    metadata.write_text(metadata.read_text().replace('"b"', '"c"').replace("'b'", "'c'"))
    with pytest.raises(CheckpointDamaged, match=r"^c: it is not in the index"):
        OrbaxReader(step)
