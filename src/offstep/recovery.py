"""What dead runs left in a directory of steps: put back or swept."""

from __future__ import annotations

import os
from pathlib import Path

from offstep import catalog, commit


def recover(root: Path) -> None:
    """Puts back what was renamed to make room and never replaced, and deletes what else dead runs left.

    The caller knows that no live process writes into `root`. What Orbax or others left is not touched.
    """
    put_back_replaced(root)
    for leftover in catalog.leftovers(root):
        commit.delete(leftover)


def put_back_replaced(root: Path) -> None:
    """Puts back what was renamed to make room where nothing took the place, and deletes it where something did."""
    for aside, final in catalog.replaced(root).items():
        if os.path.lexists(final):
            commit.delete(aside)
        else:
            commit.put_back(aside, final)
