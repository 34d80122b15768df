"""What batches take, summed up so that a log of a long run stays short."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

_WARM_UP_BATCHES = 2  # hold compilation
_SHORTEST_SECONDS = 1.0
_SHARE = 1000  # a summary covers at most this part of the run so far: their number grows with its logarithm
_MOST_SAMPLES = 256


@dataclass(frozen=True)
class Summary:
    """What some batches in a row have taken, saving left out.

    Attributes:
        began: Seconds on the clock at which the first of them began.
        count: How many.
        seconds: Of all.
        median_seconds: Of one.
        max_seconds: Of one.
        is_writing: Whether a save was on its way when they began.
        is_warm_up: Whether they are the first of the run.
    """

    began: float
    count: int
    seconds: float
    median_seconds: float
    max_seconds: float
    is_writing: bool
    is_warm_up: bool


class BatchTimes:
    """Takes the time of batches; about a microsecond for each. Training thread only.

    Args:
        clock: Gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._run_began = clock()
        self._warm_up_left = _WARM_UP_BATCHES
        self._mark: float | None = None  # beginning of the running batch
        self._is_writing = False
        self._owed_seconds = 0.0
        self._seconds = self._max_seconds = 0.0
        self._clear(0.0)

    def begin(self, *, is_writing: bool) -> Summary | None:
        """Notes that a batch begins; returns the summary that is complete by that."""
        now = self._clock()
        is_long = now - self._began > max(_SHORTEST_SECONDS, (now - self._run_began) / _SHARE)
        is_warm = self._warm_up_left == 0 and self._is_warm_up
        summary = self.take() if is_writing != self._is_writing or is_long or is_warm else None
        if self._count == 0:
            self._clear(now)
        self._mark, self._is_writing = now, is_writing
        return summary

    def end(self, stall_seconds: float, compute_seconds: float = 0.0) -> None:
        """Notes that the batch has ended, if one has begun.

        Args:
            stall_seconds: The part of it that was a save's.
            compute_seconds: The part in which a save has waited for batches that were being computed. It counts with
                the next batch: a host that runs ahead of its device is faster by that after a save.
        """
        if self._mark is None:
            return
        seconds = max(0.0, self._clock() - self._mark - stall_seconds - compute_seconds) + self._owed_seconds
        self._owed_seconds = compute_seconds
        self._mark = None
        self._count += 1
        self._seconds += seconds
        self._max_seconds = max(self._max_seconds, seconds)
        self._warm_up_left -= self._warm_up_left > 0
        if self._count % self._stride == 0:
            self._samples.append(seconds)
        if len(self._samples) == _MOST_SAMPLES:
            del self._samples[::2]
            self._stride *= 2

    def take(self) -> Summary | None:
        """Returns the summary of all batches since the last one, if there are any, and begins another."""
        if self._count == 0:
            return None
        summary = Summary(
            self._began,
            self._count,
            self._seconds,
            median(self._samples),
            self._max_seconds,
            self._is_writing,
            self._is_warm_up,
        )
        self._clear(self._clock())
        return summary

    def _clear(self, now: float) -> None:
        self._began = now
        self._count, self._stride = 0, 1
        self._seconds = self._max_seconds = 0.0
        self._samples: list[float] = []
        self._is_warm_up = self._warm_up_left > 0
