"""What a trainee does, or suffers, at a certain batch: each is called with the `Trainee` before that batch."""

from __future__ import annotations

import datetime
import os
import sys
import time
from typing import Any

from trainee import Stop, Trainee, say


def note(trainee: Trainee, text: str) -> None:
    """Says something to the parent."""
    say("note", text)


def raise_error(trainee: Trainee) -> None:
    """The training fails."""
    raise ZeroDivisionError("of the training")


def stop(trainee: Trainee) -> None:
    """The script comes to its end without a word to the saver."""
    raise Stop


def leave(trainee: Trainee) -> None:
    """Somebody calls `sys.exit`."""
    sys.exit(3)


def leave_at_once(trainee: Trainee) -> None:
    """Somebody calls `os._exit`."""
    os._exit(4)


def send(trainee: Trainee, number: int) -> None:
    """A signal comes."""
    say("note", "signal", trainee.spec.first_step + trainee.batch)
    os.kill(os.getpid(), number)


def fork(trainee: Trainee, children: int, seconds: float) -> None:
    """Data loader workers are born; they live a while beside the training."""
    for _ in range(children):
        if os.fork() == 0:
            time.sleep(seconds)
            os._exit(0)


def reap(trainee: Trainee, children: int) -> None:
    """Waits for the data loader workers; the writer is none."""
    for _ in range(children):
        _, status = os.waitpid(-1, 0)
        assert status == 0, f"a child ended with {status}"


def set_clock_back(trainee: Trainee, seconds: float) -> None:
    """The clock of this process shows an earlier time from now on."""
    move_clock(-seconds)


def move_clock(seconds: float) -> None:
    """Moves what the clocks of Python say about the date, not the monotonic ones."""
    true_time, true_ns = time.time, time.time_ns

    class Moved(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().fromtimestamp(true_time() + seconds, tz)

    time.time = lambda: true_time() + seconds
    time.time_ns = lambda: true_ns() + int(seconds * 1e9)
    datetime.datetime = Moved  # type: ignore[misc]
