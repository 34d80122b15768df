"""What saving has cost a run and what it would lose: numbers from its history. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from offstep.history import Batches, Run, Save

_FEWEST_BATCHES = 10  # of a kind, to compare kinds
_MOST_AHEAD = 1.5  # batches
_COMPILED = 5  # times the mean


@dataclass(frozen=True)
class Spread:
    """Of some lengths of time in seconds; all are NaN where there are none."""

    median: float
    p99: float
    most: float


@dataclass(frozen=True)
class Inflation:
    """How much longer a batch takes while a save is on its way; warming up is left out.

    Attributes:
        free_seconds: Mean of the batches without a save on its way.
        writing_seconds: Mean of those with one.
        error_seconds: Standard error of the difference, from how much the batches vary.
        free_count: How many.
        writing_count: How many.
        ahead_seconds: For how long a save waits in the median until batches are computed that had been dispatched.
    """

    free_seconds: float
    writing_seconds: float
    error_seconds: float
    free_count: int
    writing_count: int
    ahead_seconds: float

    @property
    def is_ahead(self) -> bool:
        """Whether the host runs so far ahead of its device that the times of batches are not those of the device."""
        count = self.free_count + self.writing_count
        known = [(self.free_seconds, self.free_count), (self.writing_seconds, self.writing_count)]
        total = sum(seconds * batches for seconds, batches in known if batches)
        return bool(count) and self.ahead_seconds > _MOST_AHEAD * total / count

    @property
    def ratio(self) -> float | None:
        """1.05 where a batch takes 5 % longer; `None` where that cannot be known."""
        if self.is_ahead or min(self.free_count, self.writing_count) < _FEWEST_BATCHES or not self.free_seconds:
            return None
        return self.writing_seconds / self.free_seconds

    @property
    def error(self) -> float:
        """Twice the standard error of the ratio: a smaller change may be chance."""
        return 2 * self.error_seconds / self.free_seconds


@dataclass(frozen=True)
class Cost:
    """What all saves of a run have cost it.

    Attributes:
        stall_seconds: Sum of what the hooks took.
        inflation_seconds: What the batches took longer, 0 where that may be chance; `None` where it cannot be known.
        training_seconds: What batches and hooks took together.
    """

    stall_seconds: float
    inflation_seconds: float | None
    training_seconds: float

    @property
    def total_seconds(self) -> float:
        """Stalls, and what the batches took longer."""
        return self.stall_seconds + (self.inflation_seconds or 0.0)

    @property
    def share(self) -> float:
        """Of the time of training; 0 where nothing is known."""
        return self.total_seconds / self.training_seconds if self.training_seconds else 0.0


@dataclass(frozen=True)
class Lag:
    """How far the newest durable checkpoint is behind, over a run.

    Attributes:
        rises: (when it becomes durable, when its snapshot was taken), of each that is newer than all before, in order;
            the first is the beginning of the run, from which on everything would be lost.
        until: The end of what is known. All are seconds since the epoch.
        mean: Seconds, over the run.
        most: Seconds.
    """

    rises: tuple[tuple[float, float], ...]
    until: float
    mean: float
    most: float


@dataclass(frozen=True)
class Loss:
    """What would be lost if the job died at the end of what is known.

    Attributes:
        seconds: Since the snapshot of the newest durable checkpoint.
        steps: Since then.
        newest: That checkpoint; `None` where there is none.
        pending: Saves on their way: they become durable if the process is killed, but not if the power goes.
    """

    seconds: float
    steps: int
    newest: Save | None
    pending: tuple[Save, ...]


def spread(values: Sequence[float]) -> Spread:
    """Returns the spread of some lengths of time."""
    if not values:
        return Spread(math.nan, math.nan, math.nan)
    ordered = sorted(values)
    return Spread(
        ordered[(len(ordered) - 1) // 2], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], ordered[-1]
    )


def snapshots(run: Run) -> list[Save]:
    """Returns the saves for which a snapshot was taken, whatever became of them."""
    return [save for save in run.saves if save.state_bytes or save.stall_seconds]


def leave_out_compilation(run: Run) -> list[Batches]:
    """Returns the batches without the first two, and without those of the first epoch that take many times the mean.

    Keras compiles the step at first, and again for a last batch that is shorter.
    """
    found = [part for part in run.batches if not part.is_warm_up]
    most = _COMPILED * _mean(found) if found else math.inf
    first_epoch_ends = run.epochs[0][1] if run.epochs else math.inf
    cut = [_cut(part) if part.ended <= first_epoch_ends and part.max_seconds > most else part for part in found]
    return [part for part in cut if part.count]


def _cut(part: Batches) -> Batches:
    return replace(part, seconds=max(0.0, part.seconds - part.max_seconds), count=part.count - 1)


def measure_inflation(run: Run) -> Inflation:
    """Compares batches beside a write with those without one."""
    usual = leave_out_compilation(run)
    free, writing = ([part for part in usual if part.is_writing is kind] for kind in (False, True))
    waits = spread([save.compute_seconds for save in snapshots(run)])
    error = math.hypot(_error(free), _error(writing))
    return Inflation(_mean(free), _mean(writing), error, _count(free), _count(writing), waits.median)


def measure_cost(run: Run, inflation: Inflation) -> Cost:
    """Sums up what saving has cost."""
    stall = sum(save.stall_seconds for save in snapshots(run))
    longer = None
    if inflation.ratio is not None:
        is_told = inflation.ratio - 1 > inflation.error
        difference = inflation.writing_seconds - inflation.free_seconds
        longer = difference * inflation.writing_count if is_told else 0.0
    return Cost(stall, longer, stall + sum(part.seconds for part in run.batches))


def measure_lag(run: Run) -> Lag:
    """Follows the newest durable checkpoint."""
    rises = [(run.began, run.began)]
    for save in sorted(run.durable, key=lambda save: save.durable_at or 0.0):
        if save.durable_at is not None and save.began > rises[-1][1]:
            rises.append((save.durable_at, save.began))
    ends = [*(at for at, _ in rises[1:]), max(run.last_at, rises[-1][0])]
    tops = [end - taken for end, (_, taken) in zip(ends, rises, strict=True)]
    area = sum((end - at) * ((at - taken) + (end - taken)) / 2 for end, (at, taken) in zip(ends, rises, strict=True))
    length = ends[-1] - run.began
    return Lag(tuple(rises), ends[-1], area / length if length else 0.0, max(tops))


def measure_loss(run: Run) -> Loss:
    """Says what would be lost."""
    newest = max(run.durable, key=lambda save: save.began, default=None)
    pending = tuple(save for save in run.saves if save.is_pending)
    if newest is None:
        first = run.batches[0].step - run.batches[0].count if run.batches else run.last_step
        return Loss(run.last_at - run.began, max(0, run.last_step - first), None, pending)
    return Loss(max(0.0, run.last_at - newest.began), max(0, run.last_step - newest.step), newest, pending)


def _mean(parts: Sequence[Batches]) -> float:
    return sum(part.seconds for part in parts) / count if (count := _count(parts)) else math.nan


def _count(parts: Sequence[Batches]) -> int:
    return sum(part.count for part in parts)


def _error(parts: Sequence[Batches]) -> float:
    """Returns the standard error of the mean batch, from how the means of the parts vary."""
    if len(parts) < 2:
        return 0.0
    mean, count = _mean(parts), _count(parts)
    squares = sum((part.seconds - part.count * mean) ** 2 for part in parts)
    return math.sqrt(squares * len(parts) / (len(parts) - 1)) / count
