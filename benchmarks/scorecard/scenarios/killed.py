"""SIGKILL at random moments: of the trainer, of its writer, of both."""

from __future__ import annotations

import time

from bench import Bench, kill
from peers import OURS, Peer
from scenario import Scenario, repeat
from verdict import Verdict

_WITHIN_SECONDS = 0.4  # after the first save was reported durable


def _kill_trainer(bench: Bench, peer: Peer, number: int) -> Verdict:
    """What was submitted is the writer's then; so long as that lives, it is waited for."""
    return _kill(bench, peer, with_writers=False)


def _kill_both(bench: Bench, peer: Peer, number: int) -> Verdict:
    return _kill(bench, peer, with_writers=True)


def _kill(bench: Bench, peer: Peer, *, with_writers: bool) -> Verdict:
    with bench.directory() as directory:
        trainee = bench.start(peer, directory, batches=20_000)
        trainee.hear_until("durable")
        time.sleep(bench.random.uniform(0, _WITHIN_SECONDS))
        trainee.kill(with_writers=with_writers)
        trainee.hear_out()
        bench.settle()
        return bench.judge(trainee)


def _kill_writer(bench: Bench, peer: Peer, number: int) -> Verdict:
    """The training goes on, and nothing may be missing at its end."""
    with bench.directory() as directory:
        trainee = bench.start(peer, directory, batches=200, delay_seconds=0.002)
        trainee.hear_until("durable")
        time.sleep(bench.random.uniform(0, _WITHIN_SECONDS))
        kill(*trainee.writers())
        trainee.hear_out()
        bench.settle()
        return bench.judge(trainee)


SCENARIOS = (
    Scenario("kill_trainer", "SIGKILL of the trainer at a random moment", repeat(_kill_trainer), 200, 200, 2),
    Scenario("kill_both", "SIGKILL of trainer and writer at a random moment", repeat(_kill_both), 100, 0, 2, OURS),
    Scenario("kill_writer", "SIGKILL of the writer in mid-run", repeat(_kill_writer), 10, 0, 2, OURS),
)
