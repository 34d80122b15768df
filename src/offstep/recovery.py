"""What dead runs left in a directory of steps: put back or swept."""

from __future__ import annotations

import os
from pathlib import Path

from offstep import catalog, commit, ownership


def recover(root: Path) -> None:
    """Puts back what was renamed to make room and never replaced, and deletes what else dead runs left.

    The caller knows that no live process writes into `root`. What Orbax or others left is not touched.
    """
    put_back_replaced(root)
    for leftover in catalog.leftovers(root):
        commit.delete(leftover)


def hold(lock_path: Path, *, takeover: bool) -> ownership.Lock:
    """Takes the lock of a target for this process, and recovers what dead runs left beside it.

    Raises:
        TargetInUse: another live run has it.
    """
    lock = ownership.acquire(lock_path, takeover=takeover)
    folder = lock_path.parent
    if lock.is_new and lock_path.name == ownership.LOCK_NAME:
        recover(folder)
    if lock.is_new:
        _sweep_files(folder, lock_path)
    return lock


def _sweep_files(folder: Path, lock_path: Path) -> None:
    """Deletes files that were never committed; nothing tells of which run they are, so only where nobody else saves."""
    files = catalog.unfinished_files(folder)  # looked for first: a run that begins now leaves later ones
    if files and ownership.is_alone(folder, lock_path):
        for file in files:
            commit.delete(file)


def put_back_replaced(root: Path) -> None:
    """Puts back what was renamed to make room where nothing took the place, and deletes it where something did."""
    for aside, final in catalog.replaced(root).items():
        if os.path.lexists(final):
            commit.delete(aside)
        else:
            commit.put_back(aside, final)
