"""What a run's saves cost, told while it trains: to the user, to JAX's monitoring, and to a log of events."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax import monitoring

from offstep.pending import PendingSave
from offstep.records import SaveStats

OnDurable = Callable[[SaveStats], object]

STALL_EVENT = "/offstep/save/stall_secs"
DURABLE_EVENT = "/offstep/save/durable_secs"
"""Names of the durations that `jax.monitoring` gets, once for each save."""


class Observer:
    """Follows the saves of one callback. Training thread only.

    Args:
        event_log: A file to which one line of JSON is appended for each event; `None` keeps none.
        on_durable: Called with the stats of each save that has become durable.
    """

    def __init__(self, event_log: str | os.PathLike[str] | None, on_durable: OnDurable | None) -> None:
        if on_durable is not None and not callable(on_durable):
            raise ValueError(f"on_durable must be a function of the stats of a save. Received: {on_durable!r}")
        self._path = None if event_log is None else Path(event_log).absolute()
        self._on_durable = on_durable
        self._in_flight: deque[PendingSave] = deque()
        self._stall_seconds = 0.0  # since the last epoch ended

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self._path, self._on_durable)  # a copy of a callback follows its own saves

    def begin(self, **about: Any) -> None:  # JSON
        """Notes that a run begins."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self._log("begin", pid=os.getpid(), **about)

    def follow(self, pending: PendingSave) -> None:
        """Notes a snapshot that has been taken."""
        stats = pending.stats
        self._stall_seconds += stats.stall_seconds
        monitoring.record_event_duration_secs(STALL_EVENT, stats.stall_seconds)
        self._in_flight.append(pending)
        self._log(
            "snapshot",
            step=stats.step,
            path=stats.path,
            state_bytes=stats.state_bytes,
            stall_seconds=stats.stall_seconds,
            wait_seconds=stats.wait_seconds,
            compute_seconds=stats.compute_seconds,
        )

    def settle(self) -> None:
        """Tells of the saves that have become durable or failed since the last call, in the order of the saves."""
        while self._in_flight and self._in_flight[0].done():
            stats = self._in_flight.popleft().stats
            if stats.skipped:
                self._log("skipped", step=stats.step, path=stats.path)
            elif stats.durable_seconds is None:
                self._log("failed", step=stats.step, path=stats.path, error=stats.error)
            else:
                self._tell_durable(stats, stats.durable_seconds)

    def end_epoch(self, epoch: int) -> float:
        """Notes the end of an epoch, counted from 1; returns for how many milliseconds saves have stalled in it."""
        stall_ms, self._stall_seconds = self._stall_seconds * 1e3, 0.0
        self._log("epoch", epoch=epoch, stall_seconds=stall_ms / 1e3)
        return stall_ms

    def end(self) -> None:
        """Notes that the run has ended."""
        self.settle()
        self._log("end")

    def _tell_durable(self, stats: SaveStats, seconds: float) -> None:
        monitoring.record_event_duration_secs(DURABLE_EVENT, seconds)
        self._log(
            "durable",
            step=stats.step,
            path=stats.path,
            durable_seconds=seconds,
            cpu_seconds=stats.cpu_seconds,
            written_bytes=stats.written_bytes,
        )
        if self._on_durable is not None:
            self._on_durable(stats)

    def _log(self, event: str, **about: Any) -> None:  # JSON
        if self._path is None:
            return
        line = json.dumps({"event": event, "time": time.time()} | about) + "\n"
        try:
            with self._path.open("a") as file:
                file.write(line)
        except OSError as error:
            # A log is not worth a training; that it ends here is said.
            warnings.warn(f"{self._path}: no more events are logged: {error}", RuntimeWarning, stacklevel=3)
            self._path = None


def describe_costs(stats: SaveStats) -> str:
    """Returns a line on what a durable save has cost."""
    seconds = stats.durable_seconds or 0.0
    written = stats.written_bytes or 0
    speed = f", {written / seconds / 1e6:,.0f} MB/s" if seconds else ""
    return (
        f"offstep: step {stats.step} durable after {seconds * 1e3:,.0f} ms: training stalled for "
        f"{stats.stall_seconds * 1e3:,.1f} ms, {written / 1e6:,.1f} MB written{speed}"
    )
