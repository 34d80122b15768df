"""A training ends early, with a save in flight: what had been accepted is there, or somebody is told that it is not."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import Any

from bench import Bench, Trainee
from model import Shape
from peers import OURS, PEERS, Peer
from scenario import Scenario, repeat
from verdict import Verdict

_SHAPE = Shape(width=1_000_000)  # large enough that a save is in flight for a while
_SAVES = 3
_EVERY = 5
_LOOPS = tuple(name for name, peer in PEERS.items() if not peer.in_fit)


def _start(bench: Bench, peer: Peer, directory: Any, call: str, **arguments: Any) -> Trainee:
    """Starts a training to which that happens right after its last save was accepted."""
    act = {"batch": _SAVES * _EVERY + 1, "call": f"acts:{call}", **arguments}
    options = {"batches": _SAVES * _EVERY + 5, "save_every": _EVERY, "shape": _SHAPE, "closes": False}
    return bench.start(peer, directory, acts=[act], **options)


def _end(call: str, **arguments: Any) -> Any:  # Trial
    def run(bench: Bench, peer: Peer, number: int) -> Verdict:
        with bench.directory() as directory:
            trainee = _start(bench, peer, directory, call, **arguments)
            trainee.hear_out()
            bench.settle()
            return bench.judge(trainee, wants_submitted=True)

    return run


def _interrupt_twice(bench: Bench, peer: Peer, number: int) -> Verdict:
    """The second Ctrl-C comes while the process waits, or ends."""
    with bench.directory() as directory:
        trainee = _start(bench, peer, directory, "send", number=signal.SIGINT)
        trainee.hear_until("note")
        time.sleep(bench.random.uniform(0, 0.2))
        with suppress(ProcessLookupError):
            os.kill(trainee.pid, signal.SIGINT)
        trainee.hear_out()
        bench.settle()
        return bench.judge(trainee, wants_submitted=True)


def _preempt(bench: Bench, peer: Peer, number: int) -> Verdict:
    """Not only what was accepted is there, but the state of the batch at which the signal came."""
    with bench.directory() as directory:
        batch = bench.random.randrange(_EVERY, 100)
        act = {"batch": batch, "call": "acts:send", "number": signal.SIGTERM}
        options = {"save_on_preemption": True}
        trainee = bench.start(peer, directory, batches=10_000, save_every=1_000, acts=[act], options=options)
        trainee.hear_out()
        bench.settle()
        trainee.claims.submitted.append(batch)  # it is saved at its end
        return bench.judge(trainee, wants_submitted=True)


SCENARIOS = (
    Scenario("exception", "an exception in the training", repeat(_end("raise_error")), 5, 5),
    Scenario("ctrl_c", "Ctrl-C", repeat(_end("send", number=signal.SIGINT)), 5, 5),
    Scenario("ctrl_c_twice", "Ctrl-C, and again within 0.2 s", repeat(_interrupt_twice), 10, 5),
    Scenario("sys_exit", "sys.exit", repeat(_end("leave")), 5, 5),
    Scenario("os_exit", "os._exit", repeat(_end("leave_at_once")), 5, 5),
    Scenario("script_end", "the end of a script that never waits", repeat(_end("stop")), 5, 5, 1, _LOOPS),
    Scenario("sigterm", "SIGTERM", repeat(_end("send", number=signal.SIGTERM)), 5, 5),
    Scenario("preemption", "SIGTERM at a random batch, with save_on_preemption", repeat(_preempt), 10, 0, 1, OURS[:3]),
)
