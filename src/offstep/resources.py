"""What an engine holds while a state is open: slots, the writer's plan, a thread, its part of a lock."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from offstep import ownership, shared_writer
from offstep.buffers import SlotPool
from offstep.options import Options
from offstep.ownership import Lock
from offstep.processes import Membership
from offstep.rendering import Rendering
from offstep.snapshot import Snapshotter
from offstep.submission import Opened


def borrow(
    snapshotter: Snapshotter,
    options: Options,
    format: str,  # noqa: A002  the word that records and formats use
    documents: dict[str, Any] | None,
    rendering: Rendering | None,
    lock: Lock | None,
    membership: Membership | None,
) -> Opened:
    """Makes slots and has the writer know them and the plan; the arguments are those of `Engine.open`.

    Raises:
        BudgetExceeded: not even one snapshot fits into the memory budget.
    """
    plan = snapshotter.plan
    with ExitStack() as undo:
        slots = options.slots + (options.memory_every is not None)
        pool = SlotPool(plan.slot_bytes, slots, budget_bytes=options.memory_budget)
        undo.callback(pool.close)
        writer = shared_writer.borrow_shared(in_process=options.in_process)
        undo.callback(shared_writer.return_shared, in_process=options.in_process)
        for slot in pool.slots:
            writer.add_slot(slot)
            undo.callback(writer.drop_slot, slot)
        if membership is None:
            number, joint = writer.add_plan(plan, format, documents), None
        else:
            number, joint = membership.open(writer, documents, options)
        needs_thread = snapshotter.mode != "host" or rendering is not None
        lock_number = None if lock is None or lock.is_parents else writer.add_lock(lock)
        fetcher = ThreadPoolExecutor(1, "offstep-fetch") if needs_thread else None
        opened = Opened(writer, format, number, snapshotter, pool, fetcher, rendering, lock, lock_number, joint)
        undo.pop_all()
    return opened


def give_back(opened: Opened) -> None:
    """Gives back all but the writer itself, which ends with its last user; no save is pending."""
    if opened.fetcher is not None:
        opened.fetcher.shutdown()
    if opened.joint is not None:
        opened.joint.close()
    for slot in opened.pool.slots:
        opened.writer.drop_slot(slot)
    opened.writer.drop_plan(opened.plan)
    if opened.lock_number is not None:
        opened.writer.drop_lock(opened.lock_number)
    if opened.lock is not None:
        ownership.release(opened.lock)
    opened.pool.close()
