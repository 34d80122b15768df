"""Waits on the training thread: for a step to be computed, and for what becomes of saves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from offstep.arrays import Array
from offstep.pending import PendingSave
from offstep.reports import Reports
from offstep.snapshot import Snapshotter
from offstep.submission import Opened

FindOpened = Callable[[], Opened | None]
"""What an engine has open at this moment: another thread that waits may close it."""


def wait_until_computed(snapshotter: Snapshotter, arrays: Sequence[Array]) -> float:
    """Waits for the running step where the copy has to, and returns how many seconds."""
    started = time.monotonic()
    if snapshotter.settle_mode(arrays) != "device_copy":
        snapshotter.wait_until_computed(arrays)
    return time.monotonic() - started


def wait_for_all(reports: Reports, find_opened: FindOpened, timeout: float | None) -> bool:
    """Waits until no save is pending; returns whether that was reached within `timeout` seconds."""
    deadline = None if timeout is None else time.monotonic() + timeout
    for pending in reports.pending:
        if not wait_for_one(pending, reports, find_opened, _time_left(deadline)):
            return False
    while reports.uploading and find_opened() is not None:
        remaining = _time_left(deadline)
        advance(reports, find_opened, remaining, until=lambda: not reports.uploading)
        if remaining == 0:
            break
    return not reports.uploading


def wait_for_one(pending: PendingSave, reports: Reports, find_opened: FindOpened, timeout: float | None) -> bool:
    """Waits until one save is durable or has failed; returns whether that was reached within `timeout` seconds."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while not pending.done():
        remaining = _time_left(deadline)
        if not pending.wait_until_submitted(remaining):
            return False
        advance(reports, find_opened, remaining, until=pending.done)
        if remaining == 0:
            return pending.done()
    return True


def advance(
    reports: Reports, find_opened: FindOpened, timeout: float | None = None, *, until: Callable[[], bool]
) -> None:
    """Waits for reports, or for a transfer from the device that has to come first."""
    opened = find_opened()
    if opened is None:  # another thread has taken the last report in, and closed
        return
    # What several processes commit has been written long before it is settled, and has given its slot back.
    waiting = None if opened.joint is not None else next(iter(reports.pending), None)
    if waiting is not None and not waiting.wait_until_submitted(timeout):
        return
    opened.collect(3600.0 if timeout is None else timeout, until)


def _time_left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
