"""Stops a training at a batch until the parent has done something: the act of the trainee, and the parent's side."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench import Trainee


def pause(trainee: Any) -> None:  # trainee.Trainee, which is a module of the trainee's process only
    """In the trainee: waits for all saves, says `paused`, and goes on when a line comes."""
    from trainee import say

    wait = getattr(trainee.saver, "wait_until_finished", None) or getattr(trainee.saver, "wait", None)
    if wait is not None:
        wait()
        if not trainee.peer.is_ours:
            trainee.report_all()
    say("paused")
    sys.stdin.readline()


def at(batch: int) -> dict[str, Any]:
    """Returns the act that pauses before a batch is trained."""
    return {"batch": batch, "call": "pausing:pause"}


@contextmanager
def paused(trainee: Trainee) -> Iterator[None]:
    """In the parent: the trainee pauses, and goes on after the block."""
    trainee.hear_until("paused")
    yield
    trainee.process.write("go\n")
