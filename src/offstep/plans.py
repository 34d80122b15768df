"""Lays the leaves of a state out in one slot, cut into chunks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import ml_dtypes
import numpy as np

from offstep.records import CRC_BYTES, Leaf, LeafLayout, PathKey, Plan

CHUNK_TARGET_BYTES = 16 << 20
"""Large leaves are cut into chunks of about this size, so that a resharded restore reads only what it needs."""

_CHUNK_ALIGNMENT = 64
_SLOT_ALIGNMENT = 4096
_CHANGING, _LARGE_FROZEN, _SMALL_FROZEN = range(3)  # in this order in a slot
_LARGE_FROM_BYTES = 1 << 16
_FEW_ROWS = 64
_LEAST_ROWS_PER_PADDED = 32


def item_bytes(dtype: str) -> int:
    """Returns the size in bytes of one element; `dtype` is a NumPy or ml_dtypes name."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


def make_plan(leaves: Iterable[Leaf], empty_nodes: Sequence[tuple[tuple[PathKey, ...], str]] = ()) -> Plan:
    """Places the leaves in a slot, each cut into contiguous chunks.

    They lie one after another, the frozen ones behind the others: first the large ones, each in whole pages, so that
    the slot can be written from any of them on without a copy, then the small ones, close together.
    """
    leaves = list(leaves)
    groups: dict[int, list[int]] = {_CHANGING: [], _LARGE_FROZEN: [], _SMALL_FROZEN: []}
    for index, leaf in enumerate(leaves):
        groups[_kind(leaf)].append(index)
    layouts: dict[int, LeafLayout] = {}
    offset = 0
    for kind, indices in groups.items():
        offset = _round_up(offset, _SLOT_ALIGNMENT)
        for index in indices:
            layouts[index] = _lay_out(leaves[index], offset)
            offset = _round_up(layouts[index].end, _SLOT_ALIGNMENT if kind == _LARGE_FROZEN else _CHUNK_ALIGNMENT)
    slot_bytes = _round_up(max(offset, 1), _SLOT_ALIGNMENT)
    return Plan(tuple(layouts[index] for index in range(len(leaves))), slot_bytes, tuple(empty_nodes))


def _kind(leaf: Leaf) -> int:
    if not leaf.is_frozen:
        return _CHANGING
    size_bytes = math.prod(leaf.shape) * item_bytes(leaf.dtype)
    return _LARGE_FROZEN if size_bytes >= _LARGE_FROM_BYTES else _SMALL_FROZEN


def make_whole_plan(leaves: Iterable[Leaf], empty_nodes: Sequence[tuple[tuple[PathKey, ...], str]] = ()) -> Plan:
    """Places the leaves one after another in a slot, each in one piece, also where it is sharded.

    Those without a path start on a page of their own.
    """
    layouts: list[LeafLayout] = []
    offset = 0
    for index, leaf in enumerate(leaves):
        if index and bool(leaf.path) != bool(layouts[-1].leaf.path):
            offset = _round_up(offset, _SLOT_ALIGNMENT)
        layout = _lay_out(leaf, offset, chunk_shape=tuple(max(1, size) for size in leaf.shape))
        layouts.append(layout)
        offset += layout.stride_bytes * layout.chunk_count
    slot_bytes = _round_up(max(offset, 1), _SLOT_ALIGNMENT)
    return Plan(tuple(layouts), slot_bytes, tuple(empty_nodes))


def _lay_out(leaf: Leaf, offset: int, *, chunk_shape: tuple[int, ...] | None = None) -> LeafLayout:
    size = item_bytes(leaf.dtype)
    if chunk_shape is None:
        chunk_shape = choose_chunk_shape(leaf.shape, leaf.shard_shape or leaf.shape, size, CHUNK_TARGET_BYTES)
    chunk_bytes = math.prod(chunk_shape) * size
    return LeafLayout(
        leaf=leaf,
        chunk_shape=chunk_shape,
        grid=tuple(-(-whole // part) for whole, part in zip(leaf.shape, chunk_shape, strict=True)),
        offset=offset,
        chunk_bytes=chunk_bytes,
        stride_bytes=_round_up(chunk_bytes + CRC_BYTES, _CHUNK_ALIGNMENT),
    )


def choose_chunk_shape(
    shape: tuple[int, ...], shard_shape: tuple[int, ...], itemsize: int, target_bytes: int = CHUNK_TARGET_BYTES
) -> tuple[int, ...]:
    """Returns a chunk shape whose chunks are contiguous in their shard and near `target_bytes`.

    A chunk never crosses a shard. Only leaves that are not sharded may have a padded last chunk.
    """
    chunk = [max(1, size) for size in shard_shape]  # zarr has no chunks of size 0, not even where there are no elements
    for axis, rows in enumerate(shard_shape):
        row_bytes = math.prod(shard_shape[axis + 1 :]) * itemsize
        if rows * row_bytes <= target_bytes:
            break
        fitting_rows = target_bytes // row_bytes
        if fitting_rows > 1:
            may_pad = rows == shape[axis]
            chunk[axis] = _rows_per_chunk(rows, fitting_rows, may_pad=may_pad)
            break
        chunk[axis] = 1
    return tuple(chunk)


def _rows_per_chunk(rows: int, fitting_rows: int, *, may_pad: bool) -> int:
    """Picks how many of `rows` go into one chunk: near `fitting_rows`, with little padding or none."""
    if may_pad:
        chunks = -(-rows // fitting_rows)
        if rows >= _FEW_ROWS * chunks:
            return -(-rows // chunks)  # pads fewer rows than there are chunks
        return next(count for count in range(fitting_rows, 0, -1) if -rows % count <= rows // _LEAST_ROWS_PER_PADDED)
    # A prime number of rows must not fall apart into chunks of one row each: a larger chunk is the lesser evil.
    divisors = [count for low in range(1, math.isqrt(rows) + 1) if rows % low == 0 for count in (low, rows // low)]
    return min(divisors, key=lambda count: max(count / fitting_rows, fitting_rows / count))


def list_shards(layout: LeafLayout) -> list[int]:
    """Returns which shards of the leaf its chunks in the slot are taken from, in C order over the shard grid."""
    if layout.chunks is None:
        return list(range(shard_count(layout.leaf)))
    return sorted(set(find_shards(layout)))


def find_shards(layout: LeafLayout) -> list[int]:
    """Returns which shard each chunk in the slot lies in, in C order over the shard grid."""
    numbers = np.array(layout.numbers, dtype=np.int64)
    if not layout.grid or not numbers.size:
        return [0] * len(numbers)
    shard_shape = layout.leaf.shard_shape or layout.leaf.shape
    axes = zip(np.unravel_index(numbers, layout.grid), layout.chunk_shape, shard_shape, strict=True)
    positions = tuple(at * part // own for at, part, own in axes)
    found: list[int] = np.ravel_multi_index(positions, shard_grid(layout.leaf)).tolist()
    return found


def shard_count(leaf: Leaf) -> int:
    """Returns how many distinct shards the leaf is made of."""
    return math.prod(shard_grid(leaf))


def shard_grid(leaf: Leaf) -> tuple[int, ...]:
    """Returns the number of shards along each axis."""
    shards = zip(leaf.shape, leaf.shard_shape or leaf.shape, strict=True)
    return tuple(whole // part if part else 1 for whole, part in shards)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
