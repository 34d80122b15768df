"""What a scenario is, and where those of the scorecard are.

Each module in `scenarios/` has a tuple `SCENARIOS`; a new module is found by being there.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from bench import Bench
from peers import ALL, Peer
from verdict import Ended, Hung, Verdict, judge_accident

Trial = Callable[[Bench, Peer, int], Verdict]


@dataclass(frozen=True)
class Scenario:
    """One thing that goes wrong, tried several times.

    Attributes:
        name: Key.
        question: What is asked, in one line.
        run: Yields the verdicts of that many trials; may raise `verdict.Skipped` at the first.
        trials: How many for ours.
        peer_trials: How many for each other peer.
        quick: How many with `--quick`.
        peers: Names of those it applies to.
        adds_up: Whether all trials are alike, so that those of several runs add up; else each is a case of its own.
        find_obstacle: Says why it cannot run on this machine (no root, no loop device), or nothing.
    """

    name: str
    question: str
    run: Callable[[Bench, Peer, int], Generator[Verdict]]
    trials: int = 5
    peer_trials: int = 3
    quick: int = 1
    peers: tuple[str, ...] = ALL
    adds_up: bool = True
    find_obstacle: Callable[[], str | None] = lambda: None


def repeat(trial: Trial) -> Callable[[Bench, Peer, int], Generator[Verdict]]:
    """Makes the trials of a scenario from a function for one, given its number; one that hangs has such a verdict."""

    def run(bench: Bench, peer: Peer, count: int) -> Generator[Verdict]:
        for number in range(count):
            yield judge_hanging(lambda number=number: trial(bench, peer, number))

    return run


def judge_hanging(trial: Callable[[], Verdict]) -> Verdict:
    """Runs one trial; that something hung, or ended too early, is its verdict."""
    try:
        return trial()
    except (Hung, Ended) as error:
        return judge_accident(error)


def judge_alone(bench: Bench, trial: Callable[[], Verdict]) -> Verdict:
    """Runs one of several trials in one place; no process of it outlives it, even if it hung."""
    try:
        return judge_hanging(trial)
    finally:
        bench.end_all()


def collect_scenarios() -> dict[str, Scenario]:
    """Returns all scenarios by name, in the order of their modules."""
    folder = Path(__file__).parent / "scenarios"
    names = sorted(module.name for module in pkgutil.iter_modules([str(folder)]))
    modules = [importlib.import_module(f"scenarios.{name}") for name in names]
    return {scenario.name: scenario for module in modules for scenario in module.SCENARIOS}
