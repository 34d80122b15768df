"""Others work on the same directory or process: a second run, readers, forked children."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import replace

from bench import DEADLINE_SECONDS, Bench, kill
from model import Shape
from peers import Peer
from scenario import Scenario, repeat
from verdict import Verdict

_FORKS = 200
_FORKS_AT_ONCE = 10


def _run_two(bench: Bench, peer: Peer, number: int) -> Verdict:
    """The second is refused, or both keep what they have."""
    with bench.directory() as directory:
        first = bench.start(peer, directory, batches=300, delay_seconds=0.01)
        first.hear_until("durable")
        second = bench.start(peer, directory, batches=60, shape=Shape(scale=2))
        second.hear_out()
        first.hear_out(2 * DEADLINE_SECONDS)
        bench.settle()
        verdict = bench.judge(first)
        if verdict.has_survived and second.claims.submitted:
            verdict = bench.judge(second)
        if not second.claims.submitted and not re.search("another|in use|exist", second.errors, re.IGNORECASE):
            verdict = replace(verdict, fault="the second saved nothing, and does not say why")
        return verdict


def _fork(bench: Bench, peer: Peer, number: int) -> Verdict:
    """Data loader workers are born between any two batches, and outlive some saves."""
    with bench.directory() as directory:
        times = _FORKS // _FORKS_AT_ONCE
        births = [
            {"batch": 2 + 2 * i, "call": "acts:fork", "children": _FORKS_AT_ONCE, "seconds": 0.05} for i in range(times)
        ]
        end = {"batch": 2 + 2 * times, "call": "acts:reap", "children": _FORKS}
        trainee = bench.start(peer, directory, batches=2 * times + 10, acts=[*births, end])
        status = trainee.hear_out()
        bench.settle()
        verdict = bench.judge(trainee)
        return verdict if status == 0 else replace(verdict, fault=f"it ended with {status}: {trainee.errors[-200:]}")


def _read_during_saves(bench: Bench, peer: Peer, count: int) -> Generator[Verdict]:
    """Each read of the newest checkpoint finds one, whole."""
    with bench.directory() as directory:
        trainee = bench.start(peer, directory, epochs=1_000, batches=1_000, save_every=2, delay_seconds=0.005)
        trainee.hear_until("durable")
        for _ in range(count):
            [found] = bench.find(peer, directory, only_newest=True) or [None]
            if found is None:
                yield Verdict(fault="there is none")
            else:
                broken = f"unreadable: {found.detail}" if found.state == "error" else ""
                yield Verdict(is_silent=found.state == "wrong", fault=broken, detail=found.detail)
            trainee.drain()
        kill(trainee.pid)


SCENARIOS = (
    Scenario("two_runs", "two live runs on one directory", repeat(_run_two), 3, 3),
    Scenario("forks", f"{_FORKS} forks while saving", repeat(_fork), 3, 2),
    Scenario(
        "reader", "the newest is read while others are saved; a trial is a read", _read_during_saves, 1000, 200, 5
    ),
)
