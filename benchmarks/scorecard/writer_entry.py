"""What a writer process of ours suffers: calls of the disk that fail or kill, and a commit that is not one.

The trainee installs it; the writer finds what to do in its environment, as JSON:

    point, nth, after, always: as in `failing_disk.Plan`
    action: "die", "die_once" or "die_with_trainer" (both leave a file `marker`), or the number of an errno
    clock_seconds: how far its clock is moved
    sabotage: names in `SABOTAGE`, by which the scorecard shows that it can fail
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

_VARIABLE = "SCORECARD_WRITER"


def install(orders: dict[str, Any]) -> None:
    """In the trainee, before its writer starts."""
    from offstep import writer_process

    os.environ[_VARIABLE] = json.dumps(orders)
    writer_process.entry = __name__


def main() -> None:
    """In the writer process, in the place of `offstep.worker.main`."""
    from offstep import disk, worker

    orders = json.loads(os.environ[_VARIABLE])
    if "point" in orders:
        disk.calls = _plan(orders).calls()
    if "clock_seconds" in orders:
        _move_clock(orders["clock_seconds"])
    for name in orders.get("sabotage", ()):
        SABOTAGE[name]()
    worker.main()


def _plan(orders: dict[str, Any]) -> Any:  # failing_disk is a module of the tests
    import failing_disk

    options = {name: orders[name] for name in ("nth", "after", "always") if name in orders}
    return failing_disk.Plan(orders["point"], _action(orders), **options)


def _action(orders: dict[str, Any]) -> Callable[[], None]:
    import failing_disk

    action = orders["action"]
    if isinstance(action, int):
        return failing_disk.fail_with(action)
    if action == "die_once":
        return failing_disk.die_once(Path(orders["marker"]))
    if action == "die_with_trainer":
        return lambda: _die_with_trainer(Path(orders["marker"]))
    assert action == "die", action
    return failing_disk.die


def _move_clock(seconds: float) -> None:
    true_time, true_ns = time.time, time.time_ns
    time.time = lambda: true_time() + seconds
    time.time_ns = lambda: true_ns() + int(seconds * 1e9)


def _die_with_trainer(marker: Path) -> None:
    marker.touch()
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------------ sabotage


def _sync_nothing() -> None:
    from offstep import disk

    def pretend(descriptor: int) -> None:
        pass

    disk.calls = replace(disk.calls, fsync_file=pretend, fsync_directory=pretend, fsync_parent=pretend)


def _sync_no_directory() -> None:
    from offstep import disk

    def pretend(descriptor: int) -> None:
        pass

    disk.calls = replace(disk.calls, fsync_directory=pretend, fsync_parent=pretend)


def _write_in_place() -> None:
    """Writes into the final name, rather than into another one that then takes its place."""
    from offstep import commit

    def move(staged: Any) -> None:  # either kind
        if staged.final.is_dir():
            commit.remove_directory(staged.final)
        os.rename(staged.path, staged.final)
        staged.path = staged.final

    class File(commit.StagedFile):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            move(self)
            self._is_ours = False

    class Directory(commit.StagedDirectory):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            move(self)
            self._disposable = None

        def commit(self) -> None:
            for descriptor in (*self._files, *self._directories.values(), self._parent):
                os.fsync(descriptor)

    commit.StagedFile, commit.StagedDirectory = File, Directory  # type: ignore[misc]


SABOTAGE: dict[str, Callable[[], None]] = {
    "no_fsync": _sync_nothing,
    "no_directory_fsync": _sync_no_directory,
    "in_place": _write_in_place,
}
