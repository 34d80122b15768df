"""Disk calls that fail, or kill the process, at the n-th call: here, or in a writer with an entry point of its own."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from offstep.commit import StagedDirectory
from offstep.disk import Calls

POINTS = tuple(field.name for field in fields(Calls))
Action = Callable[[], None]


class Plan:
    """Which call of which point fails.

    Args:
        point: A field of `Calls`, or `"any"`: then calls of all points are counted together.
        nth: Counts from 1.
        action: Raises, or ends the process; it comes in the place of the call.
        after: It comes after the call instead.
        always: All later calls of the point fail as well.
    """

    def __init__(self, point: str, action: Action, *, nth: int = 1, after: bool = False, always: bool = False) -> None:
        self._point, self._action, self._nth, self._after, self._always = point, action, nth, after, always
        self.counts: Counter[str] = Counter()

    def calls(self) -> Calls:
        """Returns the table to put into `offstep.disk.calls`."""
        return Calls(**{point: self._wrap(point) for point in POINTS})

    def _wrap(self, point: str) -> Callable[..., Any]:
        call = getattr(Calls(), point)

        def checked(*args: Any) -> Any:
            self.counts[point] += 1
            self.counts["any"] += 1
            number = self.counts[self._point]
            is_due = self._point in (point, "any") and (number == self._nth or (self._always and number > self._nth))
            if is_due and not self._after:
                self._action()
            result = call(*args)
            if is_due and self._after:
                self._action()
            return result

        return checked


def fail_with(code: int) -> Action:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(marker: Path) -> Action:
    """Dies, unless a process that was told the same has died already."""

    def fail() -> None:
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return
        die()

    return fail


def kill_once(victim: str, marker: Path) -> Action:
    """Kills the process that `victim` computes, unless that was done already."""

    def fail() -> None:
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(eval(victim), signal.SIGKILL)

    return fail


def save(final: Path, content: bytes) -> None:
    with StagedDirectory(final) as staged:
        staged.write({"file": (content,), "deep/er/file": (content,)})
        staged.commit()


_ENTRY = """
from pathlib import Path
import failing_disk
from offstep import disk, worker

def main():
    disk.calls = failing_disk.Plan({arguments}).calls()
    worker.main()
"""


def write_entry(directory: Path, arguments: str) -> str:
    """Makes a module whose `main` is a writer with such a `Plan`, and returns its name for `writer_process.entry`."""
    name = f"entry_{len(list(directory.glob('entry_*')))}"
    (directory / f"{name}.py").write_text(_ENTRY.format(arguments=arguments))
    return name
