"""What a run's saves cost, told while it trains: to the user, to JAX's monitoring, and to a log of events."""

from __future__ import annotations

import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jax import monitoring

from offstep.batch_times import BatchTimes, Summary
from offstep.event_log import VERSION, EventLog
from offstep.live_line import LiveLine, NotebookLine, open_line
from offstep.pending import PendingSave
from offstep.records import SaveStats
from offstep.words import show_seconds, spell_bytes

OnDurable = Callable[[SaveStats], object]

STALL_EVENT = "/offstep/save/stall_secs"
WRITE_EVENT = "/offstep/save/write_secs"
DURABLE_EVENT = "/offstep/save/durable_secs"
"""Names of the durations that `jax.monitoring` gets, once for each save."""

FAILED_EVENT = "/offstep/save/failed"
SKIPPED_EVENT = "/offstep/save/skipped"
"""Names of its events."""

_DIGITS = 6  # of seconds: microseconds


@dataclass(frozen=True)
class _Followed:
    """A save on its way: its number in the log, and when its hook began (`time.monotonic()`)."""

    number: int
    pending: PendingSave
    began: float


class Observer:
    """Follows the saves of one callback. Training thread only.

    Args:
        event_log: A file to which one line of JSON is appended for each event; `None` keeps none.
        on_durable: Called with the stats of each save that has become durable.
        is_live: Show the saves on their way where somebody looks on.
    """

    def __init__(
        self, event_log: str | os.PathLike[str] | None, on_durable: OnDurable | None, *, is_live: bool = False
    ) -> None:
        if on_durable is not None and not callable(on_durable):
            raise ValueError(f"on_durable must be a function of the stats of a save. Received: {on_durable!r}")
        self._path = None if event_log is None else Path(event_log).absolute()
        self._on_durable = on_durable
        self._log = None if self._path is None else EventLog(self._path)
        self._run = ""
        self._saves = 0
        self._batches = BatchTimes()
        self._step = 0  # after the last batch
        self._in_flight: deque[_Followed] = deque()
        self._is_live = is_live
        self._line: LiveLine | NotebookLine | None = None
        self._stall_seconds = 0.0  # since the last epoch ended
        self._stall_in_batch_seconds = self._compute_in_batch_seconds = 0.0

    def __reduce__(self) -> tuple[Callable[..., Observer], tuple[Any, ...]]:
        # A copy of a callback follows its own saves.
        return partial(type(self), is_live=self._is_live), (self._path, self._on_durable)

    def begin(self, **about: Any) -> None:  # JSON
        """Notes that a run begins."""
        self._run, self._saves = secrets.token_hex(4), 0
        self._batches = BatchTimes()
        self._line = open_line() if self._is_live else None
        self._add("begin", version=VERSION, pid=os.getpid(), **about)

    def begin_batch(self) -> None:
        """Notes that a batch begins."""
        if self._log is not None:
            self._stall_in_batch_seconds = self._compute_in_batch_seconds = 0.0
            self._add_batches(self._batches.begin(is_writing=bool(self._in_flight)))

    def end_batch(self, step: int) -> None:
        """Notes that the batch has ended and that what was due after it is saved."""
        if self._log is not None:
            self._step = step
            self._batches.end(self._stall_in_batch_seconds, self._compute_in_batch_seconds)

    def follow(self, pending: PendingSave) -> None:
        """Notes a snapshot that has just been taken."""
        stats = pending.stats
        self._stall_seconds += stats.stall_seconds
        self._stall_in_batch_seconds += stats.stall_seconds
        self._compute_in_batch_seconds += stats.compute_seconds
        monitoring.record_event_duration_secs(STALL_EVENT, stats.stall_seconds)
        self._saves += 1
        self._in_flight.append(_Followed(self._saves, pending, time.monotonic() - stats.call_seconds))
        self._add(
            "snapshot",
            save=self._saves,
            step=stats.step,
            path=stats.path,
            state_bytes=stats.state_bytes,
            began=time.time() - stats.call_seconds,
            stall_seconds=stats.stall_seconds,
            wait_seconds=stats.wait_seconds,
            compute_seconds=stats.compute_seconds,
        )
        self._show()

    def skip(self, step: int, path: str) -> None:
        """Notes a save for which no slot was free."""
        monitoring.record_event(SKIPPED_EVENT)
        self._add("skipped", save=None, step=step, path=path)

    def settle(self) -> None:
        """Tells of the saves that have become durable or failed since the last call, in the order of the saves."""
        while self._in_flight and self._in_flight[0].pending.done():
            self.hide()  # the user's function may print
            followed = self._in_flight.popleft()
            number, stats = followed.number, followed.pending.stats
            if stats.skipped:
                monitoring.record_event(SKIPPED_EVENT)
                self._add("skipped", save=number, step=stats.step, path=stats.path)
            elif stats.durable_seconds is None:
                monitoring.record_event(FAILED_EVENT)
                self._add("failed", save=number, step=stats.step, path=stats.path, error=stats.error)
            else:
                self._tell_durable(number, stats, stats.durable_seconds)
        self._show()

    def hide(self) -> None:
        """Takes the line of saves on their way off, before anything is printed."""
        if self._line is not None:
            self._line.hide()

    def _show(self) -> None:
        if self._line is not None and self._in_flight:
            self._line.show(_describe_pending(list(self._in_flight)))

    def end_epoch(self, epoch: int) -> float:
        """Notes the end of an epoch, counted from 1; returns for how many milliseconds saves have stalled in it."""
        self.hide()
        stall_ms, self._stall_seconds = self._stall_seconds * 1e3, 0.0
        self._add_batches(self._batches.take())
        self._add("epoch", epoch=epoch, stall_seconds=stall_ms / 1e3)
        return stall_ms

    def end(self) -> None:
        """Notes that the run has ended."""
        self.settle()
        self.hide()
        self._line = None
        self._add_batches(self._batches.take())
        self._add("end")
        if self._log is not None:
            self._log.close()

    def _tell_durable(self, number: int, stats: SaveStats, seconds: float) -> None:
        monitoring.record_event_duration_secs(DURABLE_EVENT, seconds)
        monitoring.record_event_duration_secs(WRITE_EVENT, stats.write_seconds or 0.0)
        self._add(
            "durable",
            save=number,
            step=stats.step,
            path=stats.path,
            durable_seconds=seconds,
            write_seconds=stats.write_seconds,
            cpu_seconds=stats.cpu_seconds,
            written_bytes=stats.written_bytes,
            retired=stats.retired,
            retire_seconds=stats.retire_seconds,
        )
        if self._on_durable is not None:
            self._on_durable(stats)

    def _add_batches(self, summary: Summary | None) -> None:
        if summary is not None:
            self._add(
                "batches",
                began=time.time() - (time.monotonic() - summary.began),
                step=self._step,
                count=summary.count,
                seconds=summary.seconds,
                median_seconds=summary.median_seconds,
                max_seconds=summary.max_seconds,
                is_writing=summary.is_writing,
                is_warm_up=summary.is_warm_up,
            )

    def _add(self, event: str, **about: Any) -> None:  # JSON
        if self._log is not None:
            self._log.add(event, run=self._run, **{name: _shorten(value) for name, value in about.items()})


def _shorten(value: Any) -> Any:  # JSON
    return round(value, _DIGITS) if isinstance(value, float) else value


def _describe_pending(followed: list[_Followed]) -> str:
    steps = ", ".join(f"{one.pending.step:,}" for one in followed)
    size = spell_bytes(sum(one.pending.stats.state_bytes for one in followed))
    age = show_seconds(time.monotonic() - followed[0].began)
    return f"offstep: {'step' if len(followed) == 1 else 'steps'} {steps} on the way to the disk for {age}, {size}"


def describe_costs(stats: SaveStats) -> str:
    """Returns a line on what a durable save has cost."""
    seconds = stats.durable_seconds or 0.0
    written = stats.written_bytes or 0
    speed = f", {written / seconds / 1e6:,.0f} MB/s" if seconds else ""
    return (
        f"offstep: step {stats.step} durable after {seconds * 1e3:,.0f} ms: training stalled for "
        f"{stats.stall_seconds * 1e3:,.1f} ms, {written / 1e6:,.1f} MB written{speed}"
    )
