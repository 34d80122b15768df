"""Where each leaf lies in a slot, and the table that fills it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from offstep import _native, plans
from offstep.copy_table import COPY_ENTRY, copy_table
from offstep.plans import choose_chunk_shape, item_bytes, make_plan, make_whole_plan, shard_count
from offstep.records import CRC_BYTES, Leaf, LeafLayout, Plan


@st.composite
def leaf_shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes from scalars to gigabytes, whole or cut evenly along any axes; nothing of them is allocated."""
    shards = draw(st.lists(st.tuples(st.integers(1, 40_000), st.sampled_from((1, 1, 1, 2, 3, 8))), max_size=4))
    shard_shape = tuple(rows for rows, _ in shards)
    return tuple(rows * count for rows, count in shards), shard_shape


@settings(max_examples=400, deadline=None)
@given(shapes=leaf_shapes(), itemsize=st.sampled_from((1, 2, 4, 8, 16)))
@example(shapes=((), ()), itemsize=4)
@example(shapes=((50_257, 1_600), (50_257, 1_600)), itemsize=4)
@example(shapes=((2, 30_011, 1_024), (1, 30_011, 1_024)), itemsize=4)
@example(shapes=((60_022, 1_024), (30_011, 1_024)), itemsize=4)  # a prime number of rows in each shard
@example(shapes=((2, 3, 40_000_000), (2, 1, 20_000_000)), itemsize=8)
def test_a_chunk_is_contiguous_near_its_target_and_inside_one_shard(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], itemsize: int
) -> None:
    shape, shard_shape = shapes
    chunk = choose_chunk_shape(shape, shard_shape, itemsize)
    assert all(1 <= part <= whole for part, whole in zip(chunk, shard_shape, strict=True))
    # Contiguous: ones, then one axis that is cut, then whole axes.
    cut = next((axis for axis, part in enumerate(chunk) if part > 1), len(chunk))
    assert chunk[cut + 1 :] == shard_shape[cut + 1 :]
    # Inside one shard: a chunk that does not divide its shard is only allowed where the axis is not sharded.
    for axis, part in enumerate(chunk):
        assert shard_shape[axis] % part == 0 or shard_shape[axis] == shape[axis]
    # Near the target: not so small that a big leaf falls apart into countless entries.
    shard_bytes = math.prod(shard_shape) * itemsize
    assert math.prod(chunk) * itemsize >= min(shard_bytes, 64 << 10)


@settings(max_examples=300, deadline=None)
@given(rows=st.integers(1, 2_000_000), columns=st.integers(1, 5_000))
@example(rows=50_257, columns=1_600)
@example(rows=3, columns=4_194_305)  # one row is just above the target
@example(rows=5, columns=1_000_000)
@example(rows=7, columns=750_000)
@example(rows=47, columns=100_000)
def test_padding_is_a_small_part_of_a_leaf(rows: int, columns: int) -> None:
    plan = make_plan([Leaf(("w",), (rows, columns), "float32")])
    state_bytes = rows * columns * 4
    assert plan.state_bytes == state_bytes
    assert plan.slot_bytes <= state_bytes * 1.04 + 2 * 4096


@st.composite
def small_trees(draw: st.DrawFn) -> list[Leaf]:
    """A few leaves with all their dtypes, small enough to be filled."""
    dtypes = st.sampled_from(("float32", "bfloat16", "float16", "float64", "int8", "bool", "complex64", "int4"))
    leaves = []
    for number in range(draw(st.integers(1, 5))):
        shards = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3)), max_size=3))
        shape = tuple(rows * count for rows, count in shards)
        leaves.append(Leaf((f"leaf{number}",), shape, draw(dtypes), shard_shape=tuple(rows for rows, _ in shards)))
    return leaves


@settings(max_examples=150, deadline=None)
@given(leaves=small_trees(), target_bytes=st.sampled_from((1, 16, 100, 10_000)))
def test_the_table_brings_every_element_to_its_chunk_once(leaves: list[Leaf], target_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "CHUNK_TARGET_BYTES", target_bytes)  # so that small leaves are cut as large ones are
        plan = make_plan(leaves)
    wholes = [random_array(leaf, seed) for seed, leaf in enumerate(leaves)]
    shards = [shard for leaf, whole in zip(leaves, wholes, strict=True) for shard in cut_into_shards(leaf, whole)]
    slot = bytearray(b"\xee" * plan.slot_bytes)
    addresses = [shard.__array_interface__["data"][0] for shard in shards]
    _native.gather(addresses, copy_table(plan).data, slot, 2)
    for layout, whole in zip(plan.leaves, wholes, strict=True):
        np.testing.assert_array_equal(read_leaf(layout, slot).view(np.uint8), whole.view(np.uint8))
    assert_disjoint(plan)


@settings(max_examples=150, deadline=None)
@given(leaves=small_trees(), without_path=st.sets(st.integers(0, 4)))
def test_a_whole_plan_puts_the_shards_of_each_leaf_together(leaves: list[Leaf], without_path: set[int]) -> None:
    leaves = [replace(leaf, path=()) if index in without_path else leaf for index, leaf in enumerate(leaves)]
    leaves.sort(key=lambda leaf: not leaf.path)
    plan = make_whole_plan(leaves)
    wholes = [random_array(leaf, seed) for seed, leaf in enumerate(leaves)]
    shards = [shard for leaf, whole in zip(leaves, wholes, strict=True) for shard in cut_into_shards(leaf, whole)]
    slot = bytearray(b"\xee" * plan.slot_bytes)
    addresses = [shard.__array_interface__["data"][0] for shard in shards]
    _native.gather(addresses, copy_table(plan).data, slot, 2)
    for layout, whole in zip(plan.leaves, wholes, strict=True):
        assert bytes(slot[layout.offset : layout.offset + whole.nbytes]) == whole.tobytes()
        if shard_count(layout.leaf) == 1:
            checksum = slot[layout.offset + whole.nbytes :][:CRC_BYTES]
            assert int.from_bytes(checksum, "little") == _native.crc32c(whole.tobytes())
    assert_disjoint(plan)
    ends = [layout.offset + layout.stride_bytes for layout in plan.leaves if layout.leaf.path]
    starts = [layout.offset for layout in plan.leaves if not layout.leaf.path]
    assert not ends or not starts or max(ends) <= min(starts) // 4096 * 4096


def random_array(leaf: Leaf, seed: int) -> np.ndarray:
    size_bytes = math.prod(leaf.shape) * item_bytes(leaf.dtype)
    content = np.frombuffer(np.random.default_rng(seed).bytes(size_bytes), np.uint8)
    if leaf.dtype == "bool":
        content = content & 1  # NumPy makes anything else a 1 when it copies
    return content.view(getattr(ml_dtypes, leaf.dtype, leaf.dtype)).reshape(leaf.shape or (1,))


def cut_into_shards(leaf: Leaf, whole: np.ndarray) -> list[np.ndarray]:
    starts = (range(0, rows, part) for rows, part in zip(leaf.shape, leaf.shard_shape, strict=True))
    return [
        np.ascontiguousarray(
            whole[tuple(slice(at, at + part) for at, part in zip(corner, leaf.shard_shape, strict=True))]
        )
        for corner in itertools.product(*starts)
    ]


def read_leaf(layout: LeafLayout, slot: bytearray) -> np.ndarray:
    """Assembles a leaf as a zarr reader does, and checks each chunk's checksum on the way."""
    dtype = np.dtype(getattr(ml_dtypes, layout.leaf.dtype, layout.leaf.dtype))
    padded = np.empty([count * part for count, part in zip(layout.grid, layout.chunk_shape, strict=True)], dtype)
    for index, (offset, size) in zip(np.ndindex(*layout.grid), layout.chunk_ranges(), strict=True):
        content, checksum = slot[offset : offset + size - CRC_BYTES], slot[offset + size - CRC_BYTES : offset + size]
        assert _native.crc32c(content) == int.from_bytes(checksum, "little")
        corner = [i * part for i, part in zip(index, layout.chunk_shape, strict=True)]
        where = tuple(slice(at, at + part) for at, part in zip(corner, layout.chunk_shape, strict=True))
        padded[where] = np.frombuffer(content, dtype).reshape(layout.chunk_shape)
    whole = padded[tuple(map(slice, layout.leaf.shape))]
    return np.ascontiguousarray(whole).reshape(layout.leaf.shape or (1,))


def assert_disjoint(plan: Plan) -> None:
    ranges = sorted(place for layout in plan.leaves for place in layout.chunk_ranges())
    ends = [offset + size for offset, size in ranges]
    assert all(end <= start for end, (start, _) in zip(ends, ranges[1:], strict=False))
    assert ends[-1] <= plan.slot_bytes
    assert plan.slot_bytes % 4096 == 0
    assert all(offset % 64 == 0 for offset, _ in ranges)


def test_a_plan_survives_the_way_through_json() -> None:
    leaves = [
        Leaf(("a", 0, "b"), (3, 4), "bfloat16", shard_shape=(3, 2), sharding='{"x": 1}'),
        Leaf(("key",), (2,), "uint32", shard_shape=(2,), prng_impl="fry"),
    ]
    plan = make_plan(leaves, [(("empty",), "Dict"), (("list", 1), "None")])
    assert Plan.from_json(plan.to_json()) == plan


def test_an_entry_has_the_size_that_the_native_module_reads() -> None:
    assert COPY_ENTRY.itemsize == 40
