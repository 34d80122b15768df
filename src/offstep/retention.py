"""Which committed checkpoints may go once a newer one is durable: a pure decision."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Kept:
    """What retention knows about one committed checkpoint.

    Attributes:
        step: Training step.
        metric: The monitored metric at that step; `None` where it is unknown or shall not count.
        finite: Whether all weights are finite.
    """

    step: int
    metric: float | None = None
    finite: bool = True


@dataclass(frozen=True)
class Ranking:
    """Which checkpoints stay beside the newest.

    Attributes:
        monitor: Name of the metric that says which is best; `None` where there is none.
        mode: Whether a smaller or a greater metric is better.
        keep_best: How many of the best stay.
        keep_every: Steps that are multiples of it stay as well.
    """

    monitor: str | None = None
    mode: Mode = "min"
    keep_best: int = 1
    keep_every: int | None = None


def check_counts(*, max_to_keep: int | None, keep_best: int | None, keep_every: int | None) -> None:
    """Checks what the user wants to keep.

    Raises:
        ValueError: a count is out of range, or says what stays beside the newest where all stay.
    """
    for name, count in (("max_to_keep", max_to_keep), ("keep_best", keep_best), ("keep_every", keep_every)):
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"{name} must be None or an integer of at least 1. Received: {count!r}")
        if name != "max_to_keep" and count is not None and max_to_keep is None:
            raise ValueError(
                f"{name} says what stays beside the newest: give max_to_keep too. Received: {name}={count}"
            )


def select_expired(
    steps: Iterable[int | Kept],
    newest: int,
    *,
    keep: int | None,
    replace_all: bool = False,
    keep_best: int = 1,
    keep_every: int | None = None,
    mode: Mode = "min",
) -> list[int]:
    """Returns the steps that may go now that `newest` is durable, in ascending order.

    Never among them: `newest`; a finite checkpoint that only checkpoints with non-finite weights would retire; a step
    greater than `newest` (another timeline: a fresh run pointed at an old directory); and, of those with a metric,
    the best. Duplicates in `steps` are one checkpoint, and `newest` may be missing from them.

    Args:
        steps: All committed checkpoints of one root, in any order.
        newest: The step that has just become durable.
        keep: How many of the newest stay, `newest` included; `None` keeps all.
        replace_all: Everything but `newest` goes, greater steps and the best too: a root that holds one step. Only
            what is finite stays for as long as `newest` is not.
        keep_best: How many of the best by metric stay beside the newest, at least 1.
        keep_every: Steps that are multiples of it stay as well.
        mode: Whether a smaller or a greater metric is better.
    """
    _check_counts(keep=keep, keep_best=keep_best, keep_every=keep_every)
    known = _by_step(steps, newest)
    if replace_all:
        return _select_replaced(known, newest)
    if keep is None:
        return []
    timeline = [known[step] for step in sorted(known, reverse=True) if step <= newest]
    staying = _select_newest(timeline, keep) | _select_best(timeline, keep_best, mode)
    if keep_every is not None:
        staying |= {kept.step for kept in timeline if kept.step % keep_every == 0}
    return sorted(kept.step for kept in timeline if kept.step not in staying)


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _by_step(steps: Iterable[int | Kept], newest: int) -> dict[int, Kept]:
    known = {newest: Kept(newest)}
    for entry in steps:
        kept = entry if isinstance(entry, Kept) else Kept(entry)
        known[kept.step] = kept
    return known


def _select_replaced(known: dict[int, Kept], newest: int) -> list[int]:
    may_retire_finite = known[newest].finite
    return sorted(
        kept.step for kept in known.values() if kept.step != newest and (may_retire_finite or not kept.finite)
    )


def _select_newest(timeline: list[Kept], keep: int) -> set[int]:
    """Counts the finite ones by themselves, so that no non-finite one takes a place from them."""
    finite = [kept for kept in timeline if kept.finite]
    return {kept.step for kept in timeline[:keep] + finite[:keep]}


def _select_best(timeline: list[Kept], keep_best: int, mode: Mode) -> set[int]:
    sign = 1.0 if mode == "min" else -1.0
    ranked = [
        (sign * kept.metric, -kept.step)
        for kept in timeline
        if kept.finite and kept.metric is not None and math.isfinite(kept.metric)
    ]
    return {-negated for _, negated in sorted(ranked)[:keep_best]}
