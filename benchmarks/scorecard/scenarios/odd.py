"""Odd values and clocks: a metric that is NaN first, weights that become NaN, a clock that is set back."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from bench import Bench, Trainee
from oracle import Found
from peers import DIRECTORIES, OURS, Peer
from scenario import Scenario, repeat
from verdict import Verdict

_DAY_SECONDS = 86_400
_METRICS = (float("nan"), 1.0, 3.0, 2.0)  # the second is the best that is a number
_BATCHES = 5
_BEST_STEP = 2 * _BATCHES
_LAST_FINITE = 10
_RETIRING = tuple(dict.fromkeys((*OURS, *DIRECTORIES)))  # stock's ModelCheckpoint retires nothing


def edit_logs(epoch: int, logs: dict[str, float]) -> None:
    """In the trainee: what the epoch's metric is."""
    logs["val_loss"] = _METRICS[epoch]


def _nan_metric(bench: Bench, peer: Peer, number: int) -> Verdict:
    """The best is kept, or somebody is told that it is not."""
    with bench.directory() as directory:
        options: dict[str, Any] = {}
        if peer.in_fit:
            options = {"monitor": "val_loss", "mode": "min", "save_best_only": True}
        elif peer.is_ours:
            options = {"monitor": "val_loss"}
        spec = {"epochs": len(_METRICS), "batches": _BATCHES, "edit_logs": "scenarios.odd:edit_logs", "keep": 1}
        trainee = bench.start(peer, directory, save_every=0 if peer.in_fit else _BATCHES, options=options, **spec)
        trainee.hear_out()
        bench.settle()
        found = bench.find(peer, directory)
        return _judge_one(trainee, found, _BEST_STEP, "the best")


def _nan_weights(bench: Bench, peer: Peer, number: int) -> Verdict:
    """One is kept; what is NaN does not retire what is not."""
    with bench.directory() as directory:
        peer = peer.with_each_step()
        trainee = bench.start(peer, directory, batches=25, keep=1, file=peer.file, nan_from=_LAST_FINITE + 1)
        trainee.hear_out()
        bench.settle()
        found = [each for each in bench.find(peer, directory) if each.step is not None and each.step <= _LAST_FINITE]
        return _judge_one(trainee, found, _LAST_FINITE, "the last finite one")


def _judge_one(trainee: Trainee, found: list[Found], step: int, what: str) -> Verdict:
    is_there = any(each.step == step and each.state == "equal" for each in found)
    was_reported = step in trainee.claims.durable or (trainee.claims.is_done and step in trainee.claims.submitted)
    texts = [f"{each.name}: step {each.step} {each.state} {each.detail}" for each in found]
    return Verdict(
        lost_bytes=trainee.shape.state_bytes if was_reported and not is_there else 0,
        is_silent=not is_there and trainee.claims.is_done and not was_reported,
        detail=f"{what} is step {step}; submitted {trainee.claims.submitted}, found {texts}",
    )


def _set_clock_back(bench: Bench, peer: Peer, number: int) -> Verdict:
    """Of two runs the second believes that the first was a day later; the newest by step are kept all the same."""
    with bench.directory() as directory:
        first = bench.start(peer, directory, batches=20)
        first.hear_out()
        bench.settle()
        _make_younger(directory, _DAY_SECONDS)
        acts = [{"batch": batch, "call": "acts:set_clock_back", "seconds": _DAY_SECONDS} for batch in (1, 11)]
        writer = {"clock_seconds": -_DAY_SECONDS} if peer.is_ours else None
        second = bench.start(peer, directory, first_step=20, batches=20, acts=acts, writer=writer)
        second.hear_out()
        bench.settle()
        second.claims.durable[:0] = first.claims.durable
        second.claims.submitted[:0] = first.claims.submitted
        return bench.judge(second)


def _make_younger(directory: Path, seconds: float) -> None:
    later = time.time() + seconds
    for entry in [directory, *directory.rglob("*")]:
        os.utime(entry, (later, later), follow_symlinks=False)


SCENARIOS = (
    Scenario("nan_metric", "the metric that decides what is best is NaN first", repeat(_nan_metric), 3, 3),
    Scenario("nan_weights", "weights become NaN while one is kept", repeat(_nan_weights), 3, 3, 1, _RETIRING),
    Scenario("clock", "the clock is set back a day, and once more", repeat(_set_clock_back), 3, 3),
)
