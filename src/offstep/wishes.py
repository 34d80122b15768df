"""What the caller of `restore` wants, and whether a checkpoint and the target can give it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from offstep.errors import StructureMismatch
from offstep.matching import (
    OPTIMIZER_GROUP,
    Matching,
    Path,
    Renaming,
    Selection,
    TargetLeaf,
    is_forgivable,
    is_selected,
    match,
)
from offstep.records import PathKey
from offstep.stored import Contents, Reader, StoredLeaf

_SHOWN = 5


@dataclass(frozen=True)
class Wishes:
    """What is to be restored, and how; the fields are the arguments of `restore`."""

    partial: Selection | None
    rename: Renaming | None
    strict: bool
    cast: bool
    threads: int


def check_arguments(partial: object, rename: object, threads: object) -> None:
    """Raises a `ValueError` for what cannot be meant."""
    prefixes = partial if isinstance(partial, (list, tuple)) else (partial,)
    if partial is not None and not callable(partial) and not all(isinstance(prefix, str) for prefix in prefixes):
        raise ValueError(f"partial must be a prefix, several, or a predicate on names. Received: {partial!r}")
    if rename is not None and not callable(rename) and not isinstance(rename, Mapping):
        raise ValueError(f"rename must be a dict from old to new names, or a function. Received: {rename!r}")
    if not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be an integer of at least 1. Received: {threads!r}")


def match_wanted(
    stored: Sequence[tuple[Path, StoredLeaf]],
    targets: Sequence[TargetLeaf],
    wishes: Wishes,
    contents: Contents,
    find_names: Callable[[], Sequence[Path]] | None,
) -> Matching:
    """Matches everything, then keeps what is wanted: neighbours help to tell leaves with made-up names apart."""
    matching = match(
        stored,
        targets,
        is_ordered=contents.is_ordered and wishes.rename is None,
        find_names=find_names,
        may_use_position=find_names is not None,
        cast=wishes.cast,
    )
    if wishes.partial is None:
        return matching
    wanted = {target.name for target in targets if is_selected(target.path, wishes.partial)}
    if not wanted:  # those of the checkpoint, which are the ones of a fresh process
        wanted = {targets[number].name for number, leaf in matching.pairs if is_selected(leaf.path, wishes.partial)}
    if not wanted:
        raise StructureMismatch(
            f"partial={wishes.partial!r} selects no leaf of the target; it has {show_names(t.name for t in targets)}"
        )
    return Matching(
        pairs=tuple((number, leaf) for number, leaf in matching.pairs if targets[number].name in wanted),
        by_position={name: stored for name, stored in matching.by_position.items() if name in wanted},
        missing=tuple(name for name in matching.missing if name in wanted),
        left_over=matching.left_over,
        mismatched={name: reason for name, reason in matching.mismatched.items() if name in wanted},
    )


def check_matching(matching: Matching, targets: Sequence[TargetLeaf], reader: Reader, wishes: Wishes) -> None:
    """Raises `StructureMismatch` for what `strict` forbids."""
    if not wishes.strict:
        return
    groups = {leaf.path[0] for leaf in reader.contents.leaves}, {target.path[0] for target in targets}
    missing = [name for name in matching.missing if _matters(name, groups[0])]
    left_over = [name for name in matching.left_over if _matters(name, groups[1])] if wishes.partial is None else []
    problems = [f"{name}: {reason}" for name, reason in matching.mismatched.items()]
    problems += [f"{name}: the checkpoint does not have it" for name in missing]
    problems += [f"{name}: the checkpoint has it, the target does not" for name in left_over]
    if not problems:
        return
    more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise StructureMismatch(
        f"{reader.path} does not fit the target, which was not changed:\n  "
        + "\n  ".join(problems[:_SHOWN])
        + more
        + f"\n{_advise(matching, missing, left_over)}"
    )


def _matters(name: str, groups: set[PathKey]) -> bool:
    """Returns whether strictness minds that the other side does not have a leaf; `groups` are those it has."""
    path = tuple(name.split("/"))
    if is_forgivable(path):
        return False
    # Weights without an optimizer, or a model that is not compiled, are no mistake; half of a group is.
    return path[0] != OPTIMIZER_GROUP or OPTIMIZER_GROUP in groups


def _advise(matching: Matching, missing: Sequence[str], left_over: Sequence[str]) -> str:
    troubled = [*matching.mismatched, *missing, *left_over]
    if all(name.startswith(OPTIMIZER_GROUP) for name in troubled):
        return (
            "Only the optimizer differs: compile the model with the one that it was trained with, or restore the "
            "weights alone with partial=('trainable_variables', 'non_trainable_variables')."
        )
    return (
        "Build the same model, say with rename={old: new} what has another name now, choose leaves with partial=..., "
        "or restore what fits with strict=False."
    )


def show_names(names: Iterable[str]) -> str:
    """Returns the first few of the names, and how many there are."""
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (f", ... ({len(listed)} in all)" if len(listed) > _SHOWN else "")
