"""Says what the native copy takes from where to fill a slot, chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from offstep.plans import find_shards, item_bytes, list_shards, shard_count, shard_grid
from offstep.records import LeafLayout, Plan

COPY_ENTRY = np.dtype(
    [
        ("source_offset", "<u8"),
        ("slot_offset", "<u8"),
        ("size", "<u8"),
        ("pad", "<u8"),
        ("source", "<u4"),
        ("flags", "<u4"),
    ]
)
"""One entry of the table that `_native.gather` reads."""

_WITH_CRC = 1


def copy_table(plan: Plan) -> np.ndarray:
    """Returns the `COPY_ENTRY` rows that fill a slot, one per chunk.

    Sources are numbered leaf by leaf, and within a leaf shard by shard in C order over the shard grid.
    """
    rows: list[tuple[int, int, int, int, int, int]] = []
    source = 0
    for layout in plan.leaves:
        rows.extend(_leaf_entries(layout, source))
        source += len(list_shards(layout))
    return np.array(rows, dtype=COPY_ENTRY)


def _leaf_entries(layout: LeafLayout, first_source: int) -> Iterator[tuple[int, int, int, int, int, int]]:
    leaf = layout.leaf
    if layout.chunks is None and layout.chunk_count == 1 and shard_count(leaf) == 1:
        yield 0, layout.offset, layout.chunk_bytes, 0, first_source, _WITH_CRC
        return
    if layout.chunks is None and layout.chunk_count == 1:
        yield from _shard_entries(layout, first_source)
        return
    itemsize = item_bytes(leaf.dtype)
    shard_shape = leaf.shard_shape or leaf.shape
    sources = {shard: first_source + at for at, shard in enumerate(list_shards(layout))}
    strides = [math.prod(shard_shape[axis + 1 :]) for axis in range(len(shard_shape))]
    for at, (number, shard) in enumerate(zip(layout.numbers, find_shards(layout), strict=True)):
        index = np.unravel_index(number, layout.grid)
        start = [int(i) * part for i, part in zip(index, layout.chunk_shape, strict=True)]
        local = [at % part for at, part in zip(start, shard_shape, strict=True)]
        extent = [min(part, whole - at) for part, whole, at in zip(layout.chunk_shape, leaf.shape, start, strict=True)]
        size = math.prod(extent) * itemsize
        yield (
            sum(at * stride for at, stride in zip(local, strides, strict=True)) * itemsize,
            layout.offset + at * layout.stride_bytes,
            size,
            layout.chunk_bytes - size,
            sources[shard],
            _WITH_CRC,
        )


def _shard_entries(layout: LeafLayout, first_source: int) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Puts the shards together to one array, run by run of what is contiguous in both; there is no checksum then."""
    leaf, part = layout.leaf, layout.leaf.shard_shape
    itemsize = item_bytes(leaf.dtype)
    split = max(axis for axis, (whole, own) in enumerate(zip(leaf.shape, part, strict=True)) if whole != own)
    strides = [math.prod(leaf.shape[axis + 1 :]) * itemsize for axis in range(len(part))]
    run_bytes = math.prod(part[split:]) * itemsize
    for shard, position in enumerate(np.ndindex(*shard_grid(leaf))):
        start = sum(at * size * stride for at, size, stride in zip(position, part, strides, strict=True))
        for run, row in enumerate(np.ndindex(*part[:split])):
            offset = start + sum(at * stride for at, stride in zip(row, strides[:split], strict=True))
            yield run * run_bytes, layout.offset + offset, run_bytes, 0, first_source + shard, 0
