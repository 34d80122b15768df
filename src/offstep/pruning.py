"""Which checkpoints of a directory may go, chosen by hand after training rather than by the run itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offstep import commit, ownership
from offstep.discovery import find_direction
from offstep.errors import TargetInUse
from offstep.listing import Entry
from offstep.retention import Kept, select_expired
from offstep.stores.path import Readable, StorePath

Mode = Literal["auto", "min", "max"]

_USUAL_MONITORS = ("val_loss", "loss")


@dataclass(frozen=True)
class Wishes:
    """What shall stay.

    Attributes:
        keep: How many of the newest.
        keep_best: How many of the best beside them.
        keep_every: Multiples of this step as well.
        monitor: The metric that tells the best; `None` takes the usual one.
        mode: Whether less or more of it is better.
    """

    keep: int
    keep_best: int = 1
    keep_every: int | None = None
    monitor: str | None = None
    mode: Mode = "auto"


def choose_monitor(entries: Sequence[Entry], wanted: str | None) -> str | None:
    """Returns the metric by which checkpoints are compared: the wanted one, else the usual one, `None` without any.

    Raises:
        ValueError: no checkpoint has the wanted one.
    """
    known = sorted({name for entry in entries for name in entry.metrics})
    if wanted is not None and wanted not in known:
        raise ValueError(f"no checkpoint has the metric {wanted!r}; they have {', '.join(known) or 'none'}")
    return wanted or next((name for name in (*_USUAL_MONITORS, *known) if name in known), None)


def find_best(entries: Sequence[Entry], monitor: str | None, mode: Mode = "auto") -> Entry | None:
    """Returns the whole and finite checkpoint with the best value, the newest of several."""
    return next(iter(rank(entries, monitor, mode)), None)


def rank(entries: Sequence[Entry], monitor: str | None, mode: Mode = "auto") -> list[Entry]:
    """Returns the whole and finite checkpoints that have a value, the best first."""
    if monitor is None:
        return []
    sign = -1.0 if find_direction(monitor, mode) == "max" else 1.0
    ranked = [
        (sign * entry.metrics[monitor], -number)
        for number, entry in enumerate(entries)
        if entry.is_whole and not entry.nonfinite and math.isfinite(entry.metrics.get(monitor, math.nan))
    ]
    return [entries[-negated] for _, negated in sorted(ranked)]


def select_prunable(entries: Sequence[Entry], wishes: Wishes) -> list[Entry]:
    """Returns the checkpoints that may go, oldest first. One that is not whole neither counts nor goes.

    Raises:
        ValueError: a wish cannot be met; see `retention.select_expired`.
    """
    select_expired([], 0, keep=wishes.keep, keep_best=wishes.keep_best, keep_every=wishes.keep_every)  # checks them
    whole = [entry for entry in entries if entry.is_whole]
    monitor = choose_monitor(whole, wishes.monitor)
    if not whole:
        return []
    numbers = _number(whole, wishes)
    kept = [
        Kept(number, entry.metrics.get(monitor) if monitor else None, not entry.nonfinite)
        for number, entry in numbers.items()
    ]
    mode = find_direction(monitor, wishes.mode) if monitor else "min"
    expired = select_expired(
        kept,
        max(numbers),
        keep=wishes.keep,
        keep_best=wishes.keep_best,
        keep_every=wishes.keep_every,
        mode=mode,
    )
    return [numbers[number] for number in expired]


def refuse_live(directory: Readable, entries: Sequence[Entry]) -> None:
    """Raises `TargetInUse` if a live run saves to a directory, or to one of those below it that have the entries."""
    if isinstance(directory, StorePath):  # there are no locks
        return
    for folder in sorted({directory, *(Path(str(entry.path)).parent for entry in entries)}):
        try:
            ownership.refuse_in_use(folder)
        except TargetInUse as error:
            text = f"{error.strerror}, and may count on what would go. Let it end, or pass --while-saving"
            raise TargetInUse(error.errno, text) from None


def remove(entry: Entry) -> None:
    """Takes one checkpoint away, durably."""
    if isinstance(entry.path, StorePath):
        entry.path.remove()
    elif entry.path.is_dir():
        commit.remove_directory(entry.path)
    else:
        commit.remove_file(entry.path)


def _number(entries: Sequence[Entry], wishes: Wishes) -> dict[int, Entry]:
    """Numbers the checkpoints by their steps, or by their age where steps do not tell all of them apart."""
    steps = {entry.step for entry in entries}
    if None not in steps and len(steps) == len(entries):
        return {entry.step: entry for entry in entries if entry.step is not None}
    if wishes.keep_every is not None:
        raise ValueError("--keep-every needs checkpoints with a step each; here some have none, or the same one")
    by_age = sorted(entries, key=lambda entry: entry.saved_at)
    return dict(enumerate(by_age))
