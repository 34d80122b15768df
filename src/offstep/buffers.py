"""Lays the leaves of a state out in one slot, and keeps slots of shared, pre-touched memory."""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from offstep import _native
from offstep.errors import BudgetExceeded
from offstep.records import CRC_BYTES, Leaf, LeafLayout, PathKey, Plan

CHUNK_TARGET_BYTES = 16 << 20
"""Large leaves are cut into chunks of about this size, so that a resharded restore reads only what it needs."""

_CHUNK_ALIGNMENT = 64
_SLOT_ALIGNMENT = 4096
_CHANGING, _LARGE_FROZEN, _SMALL_FROZEN = range(3)  # in this order in a slot
_LARGE_FROM_BYTES = 1 << 16
_FEW_ROWS = 64
_LEAST_ROWS_PER_PADDED = 32
_BUDGET_FRACTION = 0.8

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
CAN_SHARE = hasattr(os, "memfd_create")
"""Whether slots can be memory that another process maps."""

_slot_numbers = itertools.count(1)


def item_bytes(dtype: str) -> int:
    """Returns the size in bytes of one element; `dtype` is a NumPy or ml_dtypes name."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


# ---------------------------------------------------------------------------------------------------- the plan


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
        chunk_shape = choose_chunk_shape(leaf.shape, leaf.shard_shape or leaf.shape, size)
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


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


# --------------------------------------------------------------------------------------------------- the slots


class Claim:
    """Who gets the snapshot in a slot: the writer that begins to write it, or the trainer that takes it back.

    A page of memory behind the slot that both map. It holds the number of the job that nobody has claimed, or 0.

    Args:
        fd: The slot's memfd; -1 for anonymous memory.
        slot_bytes: Size of the slot before it.
    """

    def __init__(self, fd: int, slot_bytes: int) -> None:
        offset = _claim_offset(slot_bytes) if fd >= 0 else 0
        self._page = mmap.mmap(fd, mmap.PAGESIZE, offset=offset)

    def offer(self, number: int) -> None:
        """Lets a job be claimed; whoever may claim it is told after that."""
        struct.pack_into("=Q", self._page, 0, number)

    def take(self, number: int) -> bool:
        """Claims a job, and returns whether nobody else has."""
        try:
            return _native.claim(self._page, number)
        except ValueError:  # unmapped: who gave the slot up had taken the job back
            return False

    def close(self) -> None:
        """Unmaps the page."""
        self._page.close()


def _claim_offset(slot_bytes: int) -> int:
    return _round_up(slot_bytes, mmap.ALLOCATIONGRANULARITY)


class Slot:
    """One reusable host buffer that holds one whole snapshot.

    Attributes:
        number: Unique within the process.
        fd: The memfd behind the buffer, to be handed to the writer process; -1 for anonymous memory.
        buffer: The memory, writable.
        claim: Who gets the snapshot in it.
    """

    def __init__(self, size_bytes: int, *, shared: bool) -> None:
        self.number = next(_slot_numbers)
        self.size_bytes = size_bytes
        self.fd = -1
        if shared:
            self.fd = os.memfd_create(f"offstep-slot-{self.number}", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, _claim_offset(size_bytes) + mmap.PAGESIZE)
        self.buffer = mmap.mmap(self.fd, size_bytes)
        self.claim = Claim(self.fd, size_bytes)

    def prefault(self, threads: int) -> None:
        """Touches every page, so that the first snapshot copies into warm memory. Any thread; slow."""
        _native.prefault(self.buffer, threads)

    def close(self) -> None:
        """Gives the memory back; what somebody still has a view of goes with that view."""
        self.claim.close()
        with contextlib.suppress(BufferError):
            self.buffer.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class SlotPool:
    """The slots of one plan, within a budget of host memory.

    Args:
        slot_bytes: Size of one slot.
        count: Slots wanted; fewer are made when the budget does not hold as many.
        budget_bytes: Most memory to use; `None` takes 80 % of what the system has available now.
        shared: Whether the slots are memfds (a writer process) or anonymous memory (a writer thread).

    Raises:
        BudgetExceeded: not even one slot fits.
    """

    def __init__(
        self, slot_bytes: int, count: int, *, budget_bytes: int | None = None, shared: bool = CAN_SHARE
    ) -> None:
        self.count = affordable_slots(slot_bytes, count, budget_bytes)
        self._slots = [Slot(slot_bytes, shared=shared) for _ in range(self.count)]
        self._free = list(self._slots)  # guarded by self._lock
        self._lock = threading.Lock()
        self._closed = False  # guarded by self._lock
        self._toucher: threading.Thread | None = None

    def touch(self) -> None:
        """Begins to touch the pages of all slots on a thread of its own, once: a copy into fresh memory is slow."""
        if self._toucher is None:
            # Not a daemon: the interpreter must not unmap what this thread still touches.
            self._toucher = threading.Thread(target=self._prefault, name="offstep-prefault")
            self._toucher.start()

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All slots, free or not."""
        return tuple(self._slots)

    @property
    def has_free(self) -> bool:
        """Whether a slot is free at this moment."""
        return bool(self._free)

    def try_acquire(self) -> Slot | None:
        """Returns a free slot, the most recently used one first (its pages are warm), or `None`."""
        with self._lock:
            return self._free.pop() if self._free else None

    def release(self, slot: Slot) -> None:
        """Gives a slot back; any thread. After `close` it is freed for good."""
        with self._lock:
            closed = self._closed
            if not closed:
                self._free.append(slot)
        if closed:
            slot.close()

    def close(self) -> None:
        """Frees all free slots now, and the others as they are released."""
        with self._lock:
            self._closed = True
            free, self._free = self._free, []
        if self._toucher is not None:
            self._toucher.join()
        for slot in free:
            slot.close()

    def abandon(self) -> None:
        """In a forked child: unmaps the slots, which are the parent's, and closes the child's descriptors."""
        for slot in self._slots:
            with contextlib.suppress(BufferError):  # a thread of the parent was copying into it
                slot.close()

    def _prefault(self) -> None:
        for slot in reversed(self._slots):
            if self._closed:
                return
            slot.prefault(threads=1)


def affordable_slots(slot_bytes: int, count: int, budget_bytes: int | None) -> int:
    """Returns how many slots of at most `count` the budget holds.

    Raises:
        BudgetExceeded: not even one.
    """
    budget = default_budget_bytes() if budget_bytes is None else budget_bytes
    affordable = min(count, int(budget // slot_bytes))
    if affordable < 1:
        raise BudgetExceeded(
            f"One snapshot of the state takes {slot_bytes / 1e6:,.1f} MB of host memory, the budget is "
            f"{budget / 1e6:,.1f} MB. Raise `memory_budget` or free host memory."
        )
    return affordable


def default_budget_bytes() -> int:
    """Returns how much host memory slots may take where nobody says how much."""
    return int(available_bytes() * _BUDGET_FRACTION)


def available_bytes() -> int:
    """Returns how much host memory can be had now."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024
