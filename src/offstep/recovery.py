"""What dead runs left in a directory of steps, or in a store: put back or swept."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from offstep import catalog, commit, ownership
from offstep.stores.address import Address
from offstep.stores.path import StorePath


def recover(root: Path) -> None:
    """Puts back what was renamed to make room and never replaced, and deletes what else dead runs left.

    The caller knows that no live process writes into `root`. What Orbax or others left is not touched.
    """
    put_back_replaced(root)
    for leftover in catalog.leftovers(root):
        commit.discard(leftover)


def sweep_store(root: Address, is_spared: Callable[[str], bool]) -> None:
    """Deletes what dead runs left of steps in a store that were never committed; what is not theirs stays.

    Args:
        root: Of the steps.
        is_spared: Tells of the key of an object whether it belongs to a live run.

    Raises:
        OSError: something may be left.
    """
    place = StorePath(root)
    for step in catalog.named_steps(place):
        attempt = place / str(step)
        if catalog.is_unfinished(attempt):
            attempt.remove_own(is_spared)


def hold(lock_path: Path, *, takeover: bool, policy: ownership.Policy | None = None) -> ownership.Lock:
    """Takes the lock of a target for this process, and recovers what dead runs left beside it.

    That this cannot be swept is only warned of. `policy` is for `ownership.acquire`.

    Raises:
        TargetInUse: another live run has it.
        ValueError: another user of this process would delete everything that this one keeps, or the reverse.
    """
    lock = ownership.acquire(lock_path, takeover=takeover, policy=policy)
    try:
        if lock.is_new:
            _recover_beside(lock_path)
    except BaseException:
        ownership.release(lock)
        raise
    return lock


def _recover_beside(lock_path: Path) -> None:
    folder = lock_path.parent
    try:
        if lock_path.name == ownership.LOCK_NAME:
            recover(folder)
        _sweep_files(folder, lock_path)
    except OSError as error:
        text = f"what dead runs left in {folder} could not be swept: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)


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
            commit.discard(aside)
        else:
            commit.put_back(aside, final)
