"""Keeps slots of shared, pre-touched memory, within a budget."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import struct
import threading
from pathlib import Path

from offstep import _native
from offstep.errors import BudgetExceeded

CAN_SHARE = hasattr(os, "memfd_create")
"""Whether slots can be memory that another process maps."""

_BUDGET_FRACTION = 0.8

_slot_numbers = itertools.count(1)


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
    return -(-slot_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


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
