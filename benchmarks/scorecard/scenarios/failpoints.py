"""SIGKILL at every call by which a checkpoint is made durable, in place of that call: of the writer, or of both."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator

from bench import Bench
from peers import OURS, Peer
from scenario import Scenario, judge_hanging
from verdict import Verdict

_STRIDE = 11  # with few trials


def _kill_at_each(action: str) -> Callable[[Bench, Peer, int], Generator[Verdict]]:
    """Makes the trials: one for each call of two saves, until one is not reached."""

    def run(bench: Bench, peer: Peer, count: int) -> Generator[Verdict]:
        stride = 1 if count > _STRIDE else _STRIDE
        for nth in itertools.islice(itertools.count(1, stride), count):
            is_reached: list[bool] = []
            yield judge_hanging(lambda: _try(bench, peer, action, nth, is_reached))  # noqa: B023
            if is_reached == [False]:
                return

    return run


def _try(bench: Bench, peer: Peer, action: str, nth: int, is_reached: list[bool]) -> Verdict:
    with bench.directory() as directory:
        marker = directory / ".reached"
        writer = {"point": "any", "nth": nth, "action": action, "marker": str(marker)}
        # One kept: retention, or replacing, is a part of the second save.
        trainee = bench.start(peer, directory, batches=10, keep=1, writer=writer)
        trainee.hear_out()
        bench.settle()
        is_reached.append(marker.exists())
        return bench.judge(trainee, may_be_empty=not trainee.claims.is_done)


_WRITER = "SIGKILL of the writer at each call to the disk; the training goes on"
_BOTH = "SIGKILL of writer and trainer at each call to the disk"
SCENARIOS = (
    Scenario("writer_failpoints", _WRITER, _kill_at_each("die_once"), 1000, 0, 2, OURS, adds_up=False),
    Scenario("both_failpoints", _BOTH, _kill_at_each("die_with_trainer"), 1000, 0, 2, OURS, adds_up=False),
)
