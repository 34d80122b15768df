"""The base: a data file with leaves that stay as they are, which later checkpoints link to instead of writing it again.

Whether a leaf has changed is told by the checksums that a slot holds anyway. One that has changed is written with every
checkpoint from then on, until the base is written anew. Where bytes have changed, their CRC-32C stays the same once in
four billion times.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy as np

from offstep.commit import KnownFile
from offstep.formats.ocdbt import BASE_FILE, OWN_FILE, Entry, SlotRange
from offstep.records import CRC_BYTES, LeafLayout, Plan

_PAGE_BYTES = 4096


@dataclass(frozen=True)
class Run:
    """A piece of a slot that lies in one piece at `offset` of a data file."""

    slot_offset: int
    size: int
    file: int
    offset: int


@dataclass(frozen=True)
class Split:
    """How one slot is spread over the data files of its checkpoint.

    Attributes:
        runs: The whole slot but for what is in the base twice, in the order of the files.
        base: Name of the base, `d/` and 32 hex digits; `None` when no leaf is in it.
        is_linked: Whether the base exists already.
        age: How many checkpoints ago it was written.
        in_base: For each frozen leaf whether it lies in the base.
        checksums: Of all chunks of frozen leaves.
    """

    runs: tuple[Run, ...]
    base: str | None
    is_linked: bool
    age: int
    in_base: np.ndarray
    checksums: np.ndarray

    def pieces(self, slot: memoryview, file: int) -> tuple[memoryview, ...]:
        """Returns what one data file begins with; the pieces that are whole pages come first."""
        return tuple(slot[run.slot_offset : run.slot_offset + run.size] for run in self.runs if run.file == file)

    @property
    def own_bytes(self) -> int:
        """Bytes of values in the own data file."""
        return sum(run.size for run in self.runs if run.file == OWN_FILE)

    def move(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Turns ranges of the slot into those of the data files."""
        runs = sorted(self.runs, key=lambda run: run.slot_offset)
        starts = [run.slot_offset for run in runs]
        for key, value in entries:
            if isinstance(value, bytes):
                yield key, value
                continue
            run = runs[bisect_right(starts, value.offset) - 1]
            yield key, SlotRange(value.offset - run.slot_offset + run.offset, value.size, run.file)


class BaseFile:
    """Decides what lies in the base of one plan's checkpoints, and remembers what does.

    Args:
        plan: Lays out the slots; at least one of its leaves is frozen.
    """

    def __init__(self, plan: Plan) -> None:
        layouts = frozen_layouts(plan)
        self._bounds = [*(layout.offset for layout in layouts), plan.slot_bytes]
        self._first_chunks = np.cumsum([0, *(layout.chunk_count for layout in layouts[:-1])])
        self._positions = _checksum_positions(layouts)
        self._last: Split | None = None
        self.file: KnownFile | None = None  # the base of the last checkpoint

    def split(self, slot: memoryview, *, full_every: int | None = None) -> Split:
        """Returns how to write a slot, as far as possible without what the last checkpoint already has.

        Args:
            slot: Must keep its contents until it is written.
            full_every: The base is as old as this number of checkpoints at most.
        """
        last = self._last
        if last is None or (full_every is not None and last.age + 1 >= full_every):
            return self.split_anew(slot)
        checksums = self._read_checksums(slot)
        in_base = last.in_base & self._is_same(checksums, last)
        base = last.base if in_base.any() else None
        runs = last.runs if (in_base == last.in_base).all() else self._keep_in_base(last, in_base)
        return Split(runs, base, base is not None, last.age + 1, in_base, checksums)

    def split_anew(self, slot: memoryview) -> Split:
        """Returns how to write everything; what did not change since the last checkpoint goes into a new base."""
        checksums = self._read_checksums(slot)
        last = self._last
        in_base = np.ones(len(self._first_chunks), bool) if last is None else self._is_same(checksums, last)
        runs = (*self._lay_own(in_base), *_lay_runs(self._pieces(in_base), BASE_FILE))
        base = f"d/{os.urandom(16).hex()}" if in_base.any() else None
        return Split(runs, base, False, 0, in_base, checksums)

    def remember(self, split: Split, file: KnownFile | None) -> None:
        """Takes a split, and the file that is its base, as those of the last checkpoint, once this is durable."""
        self._last, self.file = split, file

    def _read_checksums(self, slot: memoryview) -> np.ndarray:
        bytes_of_each = np.frombuffer(slot, np.uint8)[self._positions[:, np.newaxis] + np.arange(CRC_BYTES)]
        return bytes_of_each.view("<u4").ravel()

    def _is_same(self, checksums: np.ndarray, last: Split) -> np.ndarray:
        """Returns for each frozen leaf whether all its chunks are as they were."""
        same: np.ndarray = np.logical_and.reduceat(checksums == last.checksums, self._first_chunks)
        return same

    def _keep_in_base(self, last: Split, in_base: np.ndarray) -> tuple[Run, ...]:
        """Leaves the base as it lies on the disk, and gives what is no longer in it to the own file."""
        own = self._lay_own(in_base)
        base = [run for run in last.runs if run.file == BASE_FILE]
        return (*own, *(kept for run in base for kept in self._cut(run, in_base)))

    def _cut(self, run: Run, in_base: np.ndarray) -> Iterator[Run]:
        for start, end in self._pieces(in_base):
            low, high = max(start, run.slot_offset), min(end, run.slot_offset + run.size)
            if low < high:
                yield replace(run, slot_offset=low, size=high - low, offset=run.offset + low - run.slot_offset)

    def _lay_own(self, in_base: np.ndarray) -> Iterator[Run]:
        front = [(0, self._bounds[0])] if self._bounds[0] else []
        return _lay_runs([*front, *self._pieces(~in_base)], OWN_FILE)

    def _pieces(self, chosen: np.ndarray) -> list[tuple[int, int]]:
        """Returns start and end of the chosen leaves' room in the slot."""
        return [bounds for bounds, is_chosen in zip(pairwise(self._bounds), chosen, strict=True) if is_chosen]


def frozen_layouts(plan: Plan) -> list[LeafLayout]:
    """Returns the frozen leaves that have any elements, in the order in which they lie in a slot."""
    found = [layout for layout in plan.leaves if layout.leaf.is_frozen and layout.chunk_count]
    return sorted(found, key=lambda layout: layout.offset)


def _checksum_positions(layouts: Sequence[LeafLayout]) -> np.ndarray:
    return np.concatenate(
        [
            layout.offset + layout.chunk_bytes + layout.stride_bytes * np.arange(layout.chunk_count, dtype=np.int64)
            for layout in layouts
        ]
    )


def _lay_runs(pieces: Iterable[tuple[int, int]], file: int) -> Iterator[Run]:
    """Joins neighbours and places them in a file: those of whole pages first, for they are written without a copy."""
    joined: list[tuple[int, int]] = []
    for _, group in groupby(pieces, _is_whole_pages):  # a small piece would spoil the large one before it
        joined += _join(group)
    offset = 0
    for start, end in sorted(joined, key=_is_whole_pages, reverse=True):
        yield Run(start, end - start, file, offset)
        offset += end - start


def _join(pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in pieces:
        follows = joined and joined[-1][1] == start
        joined.append((joined.pop()[0] if follows else start, end))
    return joined


def _is_whole_pages(piece: tuple[int, int]) -> bool:
    return not any(bound % _PAGE_BYTES for bound in piece)
