"""Which training process writes which chunk of which leaf: a pure decision, the same in all of them.

What several processes hold is shared out, so that each writes about as much as the others. Every process works out the
whole: so the one that commits knows where each chunk lies without asking.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from offstep._native import crc32c
from offstep.plans import CHUNK_TARGET_BYTES, choose_chunk_shape, find_shards, item_bytes
from offstep.records import CRC_BYTES, Leaf, LeafLayout, PathKey, Plan

Holders = Sequence[Sequence[int]]
"""For each shard of a leaf, in C order, the processes that hold it."""

Place = tuple[int, int]
"""Process, and offset in its slot."""

_PIECES = 8  # at least, of what a process writes, so that nobody gets much more than the others
_LEAST_PIECE_BYTES = 1 << 16  # a chunk costs about 100 bytes of index: smaller ones are not worth it
_ALIGNMENT, _PAGE_BYTES = 64, 4096


@dataclass(frozen=True)
class Shares:
    """Who writes what of one state.

    Attributes:
        layouts: Of all leaves, whole; their offsets mean nothing.
        places: For each leaf where each of its chunks is written, in C order over its grid.
        slot_bytes: Of each process.
        common_bytes: How many bytes at the beginning of each slot are the same in all: counters, which name the step.
        empty_nodes: See `Plan`.
    """

    layouts: tuple[LeafLayout, ...]
    places: tuple[tuple[Place, ...], ...]
    slot_bytes: tuple[int, ...]
    common_bytes: int
    empty_nodes: tuple[tuple[tuple[PathKey, ...], str], ...] = ()

    def plan(self, process: int, *, has_all_counters: bool = True) -> Plan:
        """Returns where the leaves lie in the slots of one process: those chunks that it writes, and the counters.

        Args:
            process: Which one.
            has_all_counters: Also those counters that others write.
        """
        leaves = (
            self._lay_out(layout, places, process, has_all_counters=has_all_counters)
            for layout, places in zip(self.layouts, self.places, strict=True)
        )
        return Plan(tuple(leaves), self.slot_bytes[process], self.empty_nodes)

    @staticmethod
    def _lay_out(layout: LeafLayout, places: tuple[Place, ...], process: int, *, has_all_counters: bool) -> LeafLayout:
        if has_all_counters and is_common(layout):
            return replace(layout, chunks=(0,), offset=places[0][1])
        own = [number for number, (owner, _) in enumerate(places) if owner == process]
        return replace(layout, chunks=tuple(own), offset=places[own[0]][1] if own else 0)

    @cached_property
    def digest(self) -> str:
        """Tells whether two processes have worked out the same."""
        return digest_structure(self.layouts, self.places)


def share_out(
    leaves: Sequence[Leaf],
    holders: Sequence[Holders],
    processes: int,
    empty_nodes: Sequence[tuple[tuple[PathKey, ...], str]] = (),
) -> Shares:
    """Gives each chunk to one of the processes that hold it, and a place in that one's slots.

    Args:
        leaves: In the order of the snapshot.
        holders: Of each leaf.
        processes: How many there are.
        empty_nodes: See `Plan`.
    """
    share_bytes = sum(math.prod(leaf.shape) * item_bytes(leaf.dtype) for leaf in leaves) // processes
    piece_bytes = max(_LEAST_PIECE_BYTES, min(CHUNK_TARGET_BYTES, share_bytes // _PIECES))
    layouts = tuple(
        _lay_out(leaf, piece_bytes if min(map(len, own), default=1) > 1 else CHUNK_TARGET_BYTES)
        for leaf, own in zip(leaves, holders, strict=True)
    )
    owners = _choose_owners(layouts, holders, processes)
    common = [number for number, layout in enumerate(layouts) if is_common(layout)]
    places: list[tuple[Place, ...]] = [()] * len(layouts)
    offset = 0
    for number in common:
        places[number] = ((owners[number][0], offset),)
        offset += layouts[number].stride_bytes
    ends = [offset] * processes
    for number, layout in enumerate(layouts):
        if not is_common(layout):
            places[number] = tuple(_take(ends, owner, layout.stride_bytes) for owner in owners[number])
    slot_bytes = tuple(_round_up(max(end, 1), _PAGE_BYTES) for end in ends)
    return Shares(layouts, tuple(places), slot_bytes, offset, tuple(empty_nodes))


def digest_structure(layouts: Sequence[LeafLayout], places: Sequence[object] = ()) -> str:
    """Tells whether two processes have leaves of the same names, shapes, dtypes and chunks, in the same places."""
    leaves = [[layout.leaf.name, layout.leaf.dtype, layout.leaf.shape, layout.chunk_shape] for layout in layouts]
    return f"{crc32c(json.dumps([leaves, places]).encode()):08x}"


def keep_all(
    leaves: Sequence[Leaf],
    holders: Sequence[Holders],
    process: int,
    empty_nodes: Sequence[tuple[tuple[PathKey, ...], str]] = (),
    cut: Sequence[LeafLayout] | None = None,
) -> Plan:
    """Returns where the leaves lie in the slots of a process that writes all that it holds: its disk is its own.

    Args:
        leaves: In the order of the snapshot.
        holders: Of each leaf.
        process: Which one.
        empty_nodes: See `Plan`.
        cut: Has the chunks that the leaves are to be cut into, where those are shared out later; else large ones.
    """
    offset = 0
    layouts = []
    whole = cut or [_lay_out(leaf, CHUNK_TARGET_BYTES) for leaf in leaves]
    for layout, of_leaf in zip(whole, holders, strict=True):
        is_held = [process in processes for processes in of_leaf]
        own = [number for number, shard in zip(layout.numbers, find_shards(layout), strict=True) if is_held[shard]]
        layouts.append(replace(layout, chunks=tuple(own), offset=offset))
        offset = layouts[-1].end
    return Plan(tuple(layouts), _round_up(max(offset, 1), _PAGE_BYTES), tuple(empty_nodes))


def is_common(layout: LeafLayout) -> bool:
    """Returns whether a leaf is in the slots of all processes: the step of a snapshot is read from such a counter."""
    return not layout.leaf.shape and layout.leaf.dtype.lstrip("u").startswith("int")


def _lay_out(leaf: Leaf, target_bytes: int) -> LeafLayout:
    itemsize = item_bytes(leaf.dtype)
    chunk_shape = choose_chunk_shape(leaf.shape, leaf.shard_shape or leaf.shape, itemsize, target_bytes)
    chunk_bytes = math.prod(chunk_shape) * itemsize
    return LeafLayout(
        leaf=leaf,
        chunk_shape=chunk_shape,
        grid=tuple(-(-whole // part) for whole, part in zip(leaf.shape, chunk_shape, strict=True)),
        offset=0,
        chunk_bytes=chunk_bytes,
        stride_bytes=_round_up(chunk_bytes + CRC_BYTES, _ALIGNMENT),
    )


def _choose_owners(layouts: Sequence[LeafLayout], holders: Sequence[Holders], processes: int) -> list[list[int]]:
    """Gives each chunk to the one of its holders that has least: first those with few holders, then the large ones."""
    chunks = sorted(
        (len(holders[leaf][shard]), -layout.chunk_bytes, leaf, number, shard)
        for leaf, layout in enumerate(layouts)
        for number, shard in enumerate(find_shards(layout))
    )
    owners = [[0] * layout.chunk_count for layout in layouts]
    loads = [0] * processes
    heaps: dict[int, list[tuple[int, int]]] = {}  # by identity: to compare thousands of processes takes too long
    for _, size, leaf, number, shard in chunks:
        candidates = holders[leaf][shard]
        heap = heaps.get(id(candidates)) or heaps.setdefault(id(candidates), [(0, at) for at in candidates])
        while heap[0][0] != loads[heap[0][1]]:  # it has got something as a holder of other shards
            heapq.heapreplace(heap, (loads[heap[0][1]], heap[0][1]))
        owner = heap[0][1]
        owners[leaf][number] = owner
        loads[owner] -= size
    return owners


def _take(ends: list[int], process: int, size: int) -> Place:
    place = process, ends[process]
    ends[process] += size
    return place


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
