"""What saving costs by what was timed, and how often to save then: pure arithmetic.

effective stall = (wall time with saves - wall time of as many steps without) / saves
overhead        = effective stall / (batches from save to save * time of a step)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median, pvariance

from offstep.trial import Run, Trial


@dataclass(frozen=True)
class Cost:
    """What the saves of one callback cost; seconds.

    Attributes:
        peer: A name in `trial.PEERS`.
        step_seconds: Of a step without a callback.
        call_seconds: How long a save keeps the training thread; the median.
        stall_seconds: Effective stall of a save, at a frequency at which one is finished before the next begins, if
            such a one was tried. Noise may make it negative.
        noise_seconds: By how much the stall may be wrong: the standard error by the spread of the steps without a
            callback, and what those before and after the saves differ by.
        finished_seconds: From the end of the step until the checkpoint was finished; the median.
        overheads: Batches from save to save → measured overhead as a fraction.
    """

    peer: str
    step_seconds: float
    call_seconds: float
    stall_seconds: float
    noise_seconds: float
    finished_seconds: float
    overheads: Mapping[int, float]

    @property
    def charged_seconds(self) -> float:
        """The stall that advice is based on: what was seen on the training thread is never less."""
        return max(self.stall_seconds, self.call_seconds, 1e-6)


@dataclass(frozen=True)
class Advice:
    """How often to save.

    Attributes:
        every: Batches from save to save.
        overhead: What saving takes of the time, as a fraction.
        lost_seconds: The most training that a kill takes away: the time between two saves, and until one is finished.
        wasted: What saving and failures take of the time together, as a fraction; `None` where failures were not asked
            about.
    """

    every: int
    overhead: float
    lost_seconds: float
    wasted: float | None = None


def find_cost(trial: Trial) -> Cost:
    """Returns what the saves of a trial cost."""
    before, after = (fmean(seconds) for seconds in trial.plain_seconds)
    step = (before + after) / 2
    finished = median(seconds for run in trial.runs for seconds in run.finished_seconds)
    run = _choose_run(trial.runs, step, finished)
    calls = [seconds for each in trial.runs for seconds in each.call_seconds]
    return Cost(
        peer=trial.peer,
        step_seconds=step,
        call_seconds=median(calls),
        stall_seconds=(run.wall_seconds - step * len(run.steps)) / run.saves,
        noise_seconds=_find_noise(trial, run, abs(before - after) / 2),
        finished_seconds=finished,
        overheads={run.every: run.wall_seconds / (step * len(run.steps)) - 1 for run in trial.runs},
    )


def advise_for_budget(cost: Cost, budget: float) -> Advice:
    """Returns the highest frequency within a budget at which no save waits for the one before.

    Args:
        cost: What a save costs.
        budget: Overhead allowed, as a fraction.
    """
    return _advise(cost, cost.charged_seconds / budget)


def advise_for_failures(cost: Cost, mtbf_seconds: float) -> Advice:
    """Returns the frequency that wastes least where a failure is to be expected every `mtbf_seconds`.

    That is Young's first-order optimum with Daly's corrections (J. T. Daly, "A higher order estimate of the optimum
    checkpoint interval for restart dumps", 2006, equation 37).
    """
    return _advise(cost, find_interval(cost.charged_seconds, mtbf_seconds), mtbf_seconds)


def find_interval(cost_seconds: float, mtbf_seconds: float) -> float:
    """Returns the optimum time between two saves in seconds, by Daly's equation 37."""
    if cost_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    ratio = cost_seconds / (2 * mtbf_seconds)
    return math.sqrt(2 * cost_seconds * mtbf_seconds) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_seconds


def _advise(cost: Cost, interval_seconds: float, mtbf_seconds: float | None = None) -> Advice:
    least = math.ceil(cost.finished_seconds / cost.step_seconds)
    every = max(1, math.ceil(round(interval_seconds / cost.step_seconds, 6)), least)
    period = every * cost.step_seconds
    overhead = cost.charged_seconds / period
    wasted = None
    if mtbf_seconds is not None:  # a failure takes half a period on average, and what was on its way
        wasted = overhead + (period / 2 + cost.finished_seconds) / mtbf_seconds
    return Advice(every, overhead, period + cost.finished_seconds, wasted)


def _find_noise(trial: Trial, run: Run, drift: float) -> float:
    plain = [second for seconds in trial.plain_seconds for second in seconds]
    steps = len(run.steps)
    # The time of the run varies with that of its steps, and what is taken off with that of the steps without saves.
    variance = pvariance(plain) * (steps + steps * steps / len(plain))
    return math.hypot(math.sqrt(variance), drift * steps) / run.saves


def _choose_run(runs: tuple[Run, ...], step_seconds: float, finished_seconds: float) -> Run:
    """Returns the run with the least noise per save in which saves do not pile up."""
    ordered = sorted(runs, key=lambda run: run.every)
    return next((run for run in ordered if run.every * step_seconds >= finished_seconds), ordered[-1])
