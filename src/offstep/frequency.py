"""How often to save within a budget: a pure decision from what steps and saves have taken so far.

    overhead = effective stall of a save / (batches from save to save * time of a batch)

The effective stall is the call on the training thread, without the wait for the state to be computed, and what the
batches take longer while the checkpoint is written. No save begins before the last one is durable.
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

_TRIAL_SAVES = 3  # the first of them pays for warming up, and is not counted
_TRIAL_BATCHES = 8  # free of any write, before each of them
_FIRST_BATCHES = 2  # hold compilation
_KEPT_BATCHES = 64
_KEPT_SAVES = 5
_RECONSIDERED_EVERY = 32
_TOLERANCE = 0.25  # a smaller change of the frequency is not worth a word


@dataclass(frozen=True)
class Choice:
    """A frequency, and the medians and means that it follows from.

    Attributes:
        every: Batch hooks from save to save.
        budget: Overhead allowed, as a fraction.
        batch_seconds: From one batch hook to the next.
        stall_seconds: Effective stall of a save.
        durable_seconds: From the call until the checkpoint is durable.
    """

    every: int
    budget: float
    batch_seconds: float
    stall_seconds: float
    durable_seconds: float

    @property
    def overhead(self) -> float:
        """Expected overhead, as a fraction."""
        return self.stall_seconds / (self.every * self.batch_seconds)

    def describe(self, batches_per_hook: int = 1) -> str:
        """Returns a sentence for the user."""
        every = self.every * batches_per_hook
        rate = "every batch" if every == 1 else f"every {every:,} batches"
        text = (
            f"saving {rate}: a save costs {_show(self.stall_seconds)}, "
            f"a batch takes {_show(self.batch_seconds / batches_per_hook)}"
        )
        if self.overhead < self.budget * (1 - _TOLERANCE) and self.every > 1:
            return f"{text}, a checkpoint is durable after {_show(self.durable_seconds)}; overhead {self.overhead:.2%}"
        return f"{text}; overhead {self.overhead:.2%} of {self.budget:.2%}"


class Frequency:
    """Says at which batches a save is due. Training thread only.

    A few trial saves come first, each some batches after the last one; after them the budget holds.

    Args:
        budget: Overhead allowed, as a fraction, e.g. 0.01.
        clock: Gives seconds.

    Example:
        >>> frequency = Frequency(0.01, clock=iter(range(100)).__next__)
        >>> [frequency.end_batch(is_writing=False) for _ in range(12)].index(True)
        10
    """

    def __init__(self, budget: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget = budget
        self._clock = clock
        self._mark: float | None = None  # end of the last batch
        self._paused_at: float | None = None
        self._to_ignore = _FIRST_BATCHES
        self._batches: deque[float] = deque(maxlen=_KEPT_BATCHES)  # seconds of each, saving left out
        self._free: deque[float] = deque(maxlen=_KEPT_BATCHES)  # those without a write in flight
        self._stalls: deque[float] = deque(maxlen=_KEPT_SAVES)
        self._durables: deque[float] = deque(maxlen=_KEPT_SAVES)
        self._trials = 0
        self._since_save = self._free_in_a_row = 0
        self._is_busy = False
        self._call_seconds = self._compute_seconds = 0.0  # of a save since the mark
        self._period_seconds = 0.0  # what the current save has cost so far
        self._news: Choice | None = None
        self.choice: Choice | None = None

    def end_batch(self, *, is_writing: bool) -> bool:
        """Counts a batch hook, and returns whether to save now.

        Args:
            is_writing: Whether a save is not durable yet.
        """
        now = self._clock()
        if self._mark is not None:
            self._count(now - self._mark)
        self._mark = now
        if self._is_busy and not is_writing:
            self._end_period()
        self._since_save += 1
        if self._since_save % _RECONSIDERED_EVERY == 0:
            self._choose()
        is_due = not is_writing and self._is_due()
        if is_due:  # even if nothing is saved then, because it would not be better than the best
            self._since_save = self._free_in_a_row = 0
        return is_due

    def pause(self) -> None:
        """Stops the clock: an epoch has ended, or validation begins. Again is no error."""
        self._paused_at = self._clock() if self._paused_at is None else self._paused_at

    def resume(self) -> None:
        """Lets the clock go on after a pause, if there was one."""
        if self._paused_at is not None and self._mark is not None:
            self._mark += self._clock() - self._paused_at
        self._paused_at = None

    def note_call(self, call_seconds: float, compute_seconds: float = 0.0) -> None:
        """Takes what a save has taken on the training thread; `compute_seconds` of it were training.

        Call it after the `end_batch` that asked for the save.
        """
        self._is_busy = True
        self._call_seconds, self._compute_seconds = call_seconds, compute_seconds
        self._period_seconds = call_seconds - compute_seconds

    def note_durable(self, seconds: float) -> None:
        """Takes how long a save took to become durable."""
        if self._trials:  # the first save waits for the writer to start
            self._durables.append(seconds)

    def take_news(self) -> Choice | None:
        """Returns the choice if it is a new one; once."""
        news, self._news = self._news, None
        return news

    def _count(self, seconds: float) -> None:
        if self._to_ignore:
            self._to_ignore -= 1
            return
        if not self._is_busy:
            self._free_in_a_row += 1
            self._free.append(seconds)
            self._batches.append(seconds)
            return
        usual = fmean(self._free)  # there are some: a write comes after batches without one
        seconds -= self._call_seconds
        self._period_seconds += seconds - usual
        # The call waits for all batches that were still being computed: their time is in it, and not in the others'.
        self._batches.append(max(0.0, min(seconds, usual)) + self._compute_seconds)
        self._call_seconds = self._compute_seconds = 0.0

    def _end_period(self) -> None:
        self._is_busy = False
        self._trials += 1
        if self._trials > 1:
            self._stalls.append(max(0.0, self._period_seconds))
        self._choose()

    def _is_due(self) -> bool:
        if self.choice is not None:
            return self._since_save >= self.choice.every
        return self._free_in_a_row >= _TRIAL_BATCHES

    def _batch_seconds(self) -> float:
        # The mean, because a host that runs ahead of its device waits in few of the batches for all of them. The
        # longest is left out: it may be a compilation.
        usual = sorted(self._batches)[:-1] if len(self._batches) >= _TRIAL_BATCHES else self._batches
        return max(fmean(usual), 1e-9)

    def _choose(self) -> None:
        if self._trials < _TRIAL_SAVES or not self._durables:
            return
        batch, stall = self._batch_seconds(), median(self._stalls)
        # One batch more than it takes, so that batches without a write in flight go on being measured.
        durable_batches = math.ceil(median(self._durables) / batch)
        every = max(math.ceil(round(stall / (self._budget * batch), 6)), durable_batches + 1)
        if self.choice is None or abs(every - self.choice.every) > _TOLERANCE * self.choice.every:
            self.choice = self._news = Choice(every, self._budget, batch, stall, median(self._durables))


def parse_budget(budget: str | float) -> float:
    """Returns an overhead as a fraction: `"1%"` is 0.01, and so is 0.01.

    Raises:
        ValueError: it is neither, or not between 0 and 1.
    """
    fraction = math.nan
    if isinstance(budget, (int, float)) and not isinstance(budget, bool):
        fraction = float(budget)
    elif isinstance(budget, str) and re.fullmatch(r"\s*\d*\.?\d+\s*%\s*", budget):
        fraction = float(budget.strip().rstrip("%")) / 100
    if not 0 < fraction < 1:
        raise ValueError(f"overhead_budget must be a share of the time such as '1%' or 0.01. Received: {budget!r}")
    return fraction


def _show(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
