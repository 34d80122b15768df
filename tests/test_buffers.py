"""The life of a slot's memory, and what it may take."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import pytest

from offstep.buffers import SlotPool, affordable_slots
from offstep.errors import BudgetExceeded

MB = 1 << 20


def test_a_budget_too_small_names_what_is_needed_and_what_to_do() -> None:
    text = r"takes 10\.5 MB of host memory, the budget is 3\.0 MB\. Raise `memory_budget` or free host memory"
    with pytest.raises(BudgetExceeded, match=text):
        SlotPool(10 * MB, 2, budget_bytes=3_000_000)


def test_a_small_budget_makes_fewer_slots() -> None:
    assert affordable_slots(10, 4, 40) == 4
    assert affordable_slots(10, 4, 39) == 3
    assert affordable_slots(10, 4, 10) == 1


def test_without_a_budget_the_available_memory_is_the_budget() -> None:
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert affordable_slots(4096, 2, None) == 2
    with pytest.raises(BudgetExceeded):
        affordable_slots(total_bytes, 1, None)


@pytest.mark.parametrize("shared", [True, False])
def test_slots_go_round_most_recently_used_first(shared: bool) -> None:
    pool = SlotPool(8192, 2, shared=shared)
    first, second = pool.try_acquire(), pool.try_acquire()
    assert first is not None
    assert second is not None
    assert first.number != second.number
    assert pool.try_acquire() is None
    assert not pool.has_free
    pool.release(second)
    pool.release(first)
    assert pool.try_acquire() is first
    pool.release(first)
    pool.close()


def test_a_slot_released_after_close_is_freed_then() -> None:
    before = count_memfds()
    pool = SlotPool(64 * MB, 3)
    held = pool.try_acquire()
    assert held is not None
    assert count_memfds() == before + 3
    pool.close()
    assert count_memfds() == before + 1
    held.buffer[:3] = b"abc"
    pool.release(held)
    assert count_memfds() == before
    assert not any(thread.name == "offstep-prefault" for thread in threading.enumerate())


def count_memfds() -> int:
    links = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor that lists them
            links.add(os.readlink(entry))
    return sum(link.startswith("/memfd:offstep-slot") for link in links)


def test_prefault_leaves_a_snapshot_alone() -> None:
    pool = SlotPool(4 * MB, 1)
    slot = pool.try_acquire()
    assert slot is not None
    slot.buffer[:] = bytes(range(256)) * (4 * MB // 256)
    slot.prefault(2)
    assert slot.buffer[:] == bytes(range(256)) * (4 * MB // 256)
    pool.release(slot)
    pool.close()
