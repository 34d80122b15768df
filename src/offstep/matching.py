"""Decides which stored leaf goes where in a target: by path, and by position where Keras has made the names up.

Pure: names, shapes and dtypes in, pairs out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from offstep.records import PathKey
from offstep.stored import StoredLeaf

Path = tuple[PathKey, ...]
Selection = str | Sequence[str] | Callable[[str], bool]
"""Prefixes of names, with or without the group in front, or a predicate on names."""
Renaming = Mapping[str, str] | Callable[[str], str | None]
"""Old to new prefixes of names, or a function on names; `None` drops a leaf."""

WEIGHT_GROUPS = ("trainable_variables", "non_trainable_variables")
OPTIMIZER_GROUP = "optimizer_variables"
METRICS_GROUP = "metrics_variables"
_KERAS_GROUPS = frozenset((*WEIGHT_GROUPS, OPTIMIZER_GROUP, METRICS_GROUP))
_SEED = "seed_generator_state"
_NUMBER = re.compile(r"_(\d+)(?=_|$)")


@dataclass(frozen=True)
class TargetLeaf:
    """One place to restore into.

    Attributes:
        path: Keys from the root of the target to the leaf.
        shape: Global shape, of the raw words where it takes PRNG keys.
        dtype: NumPy (or ml_dtypes) name.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        """The path joined by slashes."""
        return "/".join(map(str, self.path))


@dataclass(frozen=True)
class Matching:
    """Which stored leaf goes to which target, and what has no partner.

    Attributes:
        pairs: Index of the target, stored leaf.
        by_position: Name of a target to that of the stored leaf, where the names did not decide.
        missing: Wanted targets without a stored leaf.
        left_over: Stored leaves that nobody takes.
        mismatched: Name of a target to why its stored leaf does not fit.
    """

    pairs: tuple[tuple[int, StoredLeaf], ...]
    by_position: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    mismatched: Mapping[str, str] = field(default_factory=dict)


# --- selecting and renaming ------------------------------------------------------------------------------------------


def is_selected(path: Path, partial: Selection | None) -> bool:
    """Returns whether a leaf is among those wanted."""
    if partial is None:
        return True
    if callable(partial):
        return bool(partial("/".join(map(str, path))))
    prefixes = [partial] if isinstance(partial, str) else partial
    return any(_starts_at(path, _split(prefix)) is not None for prefix in prefixes)


def rename_leaves(leaves: Sequence[tuple[Path, StoredLeaf]], rename: Renaming | None) -> list[tuple[Path, StoredLeaf]]:
    """Returns leaves with the paths under which they are looked for; dropped ones are left out."""
    if rename is None:
        return list(leaves)
    renamed = _rename_slots([(_rename(path, rename), path, leaf) for path, leaf in leaves])
    moved = {new for new, old, _ in renamed if new is not None and new != old}
    # A leaf that takes another one's place goes before the one that had the name.
    return [(new, leaf) for new, old, leaf in renamed if new is not None and (new != old or new not in moved)]


_Renamed = list[tuple[Path | None, Path, StoredLeaf]]
"""New path, old path, leaf."""


def _rename_slots(renamed: _Renamed) -> _Renamed:
    """Lets what an optimizer keeps for a weight, which has the joined path of the weight in its name, go with it."""
    weights = {
        _join(old): None if new is None else _join(new) for new, old, _ in renamed if old and old[0] in WEIGHT_GROUPS
    }
    if all(old == new for old, new in weights.items()):
        return renamed
    return [
        (_rename_slot(old, weights) if new == old and old and old[0] == OPTIMIZER_GROUP else new, old, leaf)
        for new, old, leaf in renamed
    ]


def _rename_slot(path: Path, weights: Mapping[str, str | None]) -> Path | None:
    own = str(path[-1])
    ends = (end for end in range(len(own) - 1, 0, -1) if own[end] == "_")
    old = next((own[:end] for end in ends if own[:end] in weights), None)
    if old is None:
        return path
    new = weights[old]
    return None if new is None else (*path[:-1], new + own[len(old) :])


def _join(path: Path) -> str:
    return "_".join(map(str, path[1:]))


def _rename(path: Path, rename: Renaming) -> Path | None:
    if callable(rename):
        name = rename("/".join(map(str, path)))
        return None if name is None else _as_path(name)
    for old, new in rename.items():
        prefix = _split(old)
        start = _starts_at(path, prefix)
        if start is not None:
            return (*path[:start], *_split(new), *path[start + len(prefix) :])
    return path


def _as_path(name: str) -> Path:
    return tuple(_split(name))


def _split(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split("/") if part)


def _starts_at(path: Path, prefix: tuple[str, ...]) -> int | None:
    """Returns where in the path a prefix stands: at its start, or behind the group of a Keras state."""
    texts = tuple(map(str, path))
    if texts[: len(prefix)] == prefix:
        return 0
    if texts and texts[0] in _KERAS_GROUPS and texts[1 : 1 + len(prefix)] == prefix:
        return 1
    return None


# --- matching --------------------------------------------------------------------------------------------------------


def match(
    stored: Sequence[tuple[Path, StoredLeaf]],
    targets: Sequence[TargetLeaf],
    *,
    is_ordered: bool = False,
    find_names: Callable[[], Sequence[Path]] | None = None,
    may_use_position: bool = True,
    cast: bool = False,
) -> Matching:
    """Finds a stored leaf for each target.

    Args:
        stored: Leaves with the paths under which they are looked for, in the order of the file.
        targets: Those that are wanted, in the order of the target.
        is_ordered: Whether the order of the file is that of the state.
        find_names: Gives the names that a checkpoint has for the targets, where these may be others than the live
            ones; it takes long.
        may_use_position: Whether names may be ones that Keras numbered.
        cast: Whether dtypes may differ.
    """
    found = _match_by_name(stored, [target.path for target in targets])
    if _is_sure(found, stored, targets, is_ordered=is_ordered and may_use_position):
        return _finish(found, {}, stored, targets, cast=cast)
    names = [target.path for target in targets]
    if find_names is not None:
        names = list(find_names())
        saved = _match_by_name(stored, names)
        if _is_sure(saved, stored, targets, is_ordered=False):
            return _finish(saved, {}, stored, targets, cast=cast)
        found = max(saved, found, key=lambda partners: sum(partner is not None for partner in partners))
    if not may_use_position:
        return _finish(found, {}, stored, targets, cast=cast)
    aligned = _match_by_position(stored, targets, is_ordered=is_ordered)
    if aligned is None:
        aligned = _match_by_kind(stored, names, is_ordered=is_ordered)
    found = [other if other is not None else own for other, own in zip(aligned, found, strict=True)]
    aligned = _fill_by_class(found, stored, names, targets)
    moved = {
        target.name: stored[partner][1].name
        for target, partner in zip(targets, aligned, strict=True)
        if partner is not None and _key(stored[partner][0]) != _key(target.path)
    }
    return _finish(aligned, moved, stored, targets, cast=cast)


Partners = list[int | None]
"""For each target the index of its stored leaf."""


def _key(path: Path) -> Path:
    """What identifies a leaf: a frozen weight is the same one as a trainable one."""
    return tuple(map(str, path[1:] if path and path[0] in WEIGHT_GROUPS else path))


def _match_by_name(stored: Sequence[tuple[Path, StoredLeaf]], paths: Sequence[Path]) -> Partners:
    numbers = {_key(path): number for number, (path, _) in enumerate(stored)}
    return [numbers.get(_key(path)) for path in paths]


def _is_sure(
    partners: Partners,
    stored: Sequence[tuple[Path, StoredLeaf]],
    targets: Sequence[TargetLeaf],
    *,
    is_ordered: bool,
) -> bool:
    """Returns whether names leave no doubt: all are found, shapes agree, and so does the order where there is one."""
    last: dict[PathKey, int] = {}
    for partner, target in zip(partners, targets, strict=True):
        if partner is None:
            if is_forgivable(target.path):
                continue
            return False
        path, leaf = stored[partner]
        if leaf.shape != target.shape:
            return False
        if is_ordered and path[0] == target.path[0] and path[0] != METRICS_GROUP:
            if last.get(path[0], -1) > partner:
                return False
            last[path[0]] = partner
    return True


def _match_by_position(
    stored: Sequence[tuple[Path, StoredLeaf]], targets: Sequence[TargetLeaf], *, is_ordered: bool
) -> Partners | None:
    """Pairs the leaves of each group in their order, if the two structures are the same but for numbers in names."""
    partners: Partners = [None] * len(targets)
    by_group = _number_by_group([path for path, _ in stored])
    for group, numbers in _number_by_group([target.path for target in targets]).items():
        if group == METRICS_GROUP:
            continue
        candidates = by_group.get(group, [])
        if len(candidates) != len(numbers):
            return None
        pairs = zip(numbers, candidates, strict=True)
        if not is_ordered:
            pairs = zip(
                _sort([t.path for t in targets], numbers), _sort([p for p, _ in stored], candidates), strict=True
            )
        for number, candidate in pairs:
            path, leaf = stored[candidate]
            if leaf.shape != targets[number].shape or not _is_same_kind(path, targets[number].path, is_ordered):
                return None
            partners[number] = candidate
    return partners


def _match_by_kind(stored: Sequence[tuple[Path, StoredLeaf]], names: Sequence[Path], *, is_ordered: bool) -> Partners:
    """Pairs the leaves of each group that are the same, one after another, but for numbers in names.

    Shapes may differ, which is then told of the right leaf. States of random generators, which layers such as `Dropout`
    bring along, are pairs by themselves.
    """
    partners: Partners = [None] * len(names)
    paths = [path for path, _ in stored]
    by_part = _number_by_part(paths)
    for part, numbers in _number_by_part(names).items():
        places, candidates = numbers, by_part.get(part, [])
        if not is_ordered:
            places, candidates = _sort(names, places), _sort(paths, candidates)
        is_same = [_stem(names[place]) for place in places] == [_stem(paths[one]) for one in candidates]
        if is_same and part[0] != METRICS_GROUP:
            partners = _with_pairs(partners, places, candidates)
    return partners


def _number_by_part(paths: Sequence[Path]) -> dict[tuple[PathKey, bool], list[int]]:
    parts: dict[tuple[PathKey, bool], list[int]] = {}
    for number, path in enumerate(paths):
        parts.setdefault((path[0], path[-1] == _SEED), []).append(number)
    return parts


def _number_by_group(paths: Iterable[Path]) -> dict[PathKey, list[int]]:
    groups: dict[PathKey, list[int]] = {}
    for number, path in enumerate(paths):
        groups.setdefault(path[0], []).append(number)
    return groups


def _is_same_kind(path: Path, other: Path, is_ordered: bool) -> bool:
    if not is_ordered:
        return _stem(path) == _stem(other)
    # In order, the variable's own name is enough: a layer may have got another name by hand.
    return _own_name(path) == _own_name(other)


def _own_name(path: Path) -> str:
    own = _NUMBER.sub("", str(path[-1]))
    return own.rsplit("_", 1)[-1] if path[0] == OPTIMIZER_GROUP else own


def _stem(path: Path) -> Path:
    """The path without the numbers that Keras puts behind names."""
    return tuple(_NUMBER.sub("", str(key)) for key in path)


def _rank(path: Path) -> tuple[Path, tuple[tuple[int, ...], ...]]:
    """Sorts paths of one stem by their numbers, in the order in which Keras gives them out."""
    return _stem(path), tuple(tuple(map(int, _NUMBER.findall(str(key)))) for key in path)


def _sort(paths: Sequence[Path], numbers: Iterable[int]) -> list[int]:
    return sorted(numbers, key=lambda number: _rank(paths[number]))


def _fill_by_class(
    found: Partners,
    stored: Sequence[tuple[Path, StoredLeaf]],
    names: Sequence[Path],
    targets: Sequence[TargetLeaf],
) -> Partners:
    """Completes a matching by names: pairs what is left of each stem, where both sides have as many."""
    partners = list(found)
    used = {partner for partner in found if partner is not None}
    free: dict[Path, list[int]] = {}
    for number, (path, _) in enumerate(stored):
        if number not in used:
            free.setdefault(_stem(path), []).append(number)
    wanted: dict[Path, list[int]] = {}
    for number, name in enumerate(names):
        if partners[number] is None:
            wanted.setdefault(_stem(name), []).append(number)
    for stem, numbers in wanted.items():
        candidates = _sort([path for path, _ in stored], free.get(stem, []))
        places = _sort(names, numbers)
        if [stored[number][1].shape for number in candidates] == [targets[number].shape for number in places]:
            partners = _with_pairs(partners, places, candidates)
    return partners


def _with_pairs(partners: Partners, places: Sequence[int], candidates: Sequence[int]) -> Partners:
    changed = dict(zip(places, candidates, strict=True))
    return [changed.get(number, partner) for number, partner in enumerate(partners)]


def _finish(
    partners: Partners,
    by_position: Mapping[str, str],
    stored: Sequence[tuple[Path, StoredLeaf]],
    targets: Sequence[TargetLeaf],
    *,
    cast: bool,
) -> Matching:
    pairs, mismatched, missing = [], {}, []
    for number, (target, partner) in enumerate(zip(targets, partners, strict=True)):
        if partner is None:
            missing.append(target.name)
            continue
        leaf = stored[partner][1]
        reason = _find_difference(leaf, target, cast=cast)
        if reason:
            mismatched[target.name] = reason
        else:
            pairs.append((number, leaf))
    used = {partner for partner in partners if partner is not None}
    left_over = tuple(leaf.name for number, (_, leaf) in enumerate(stored) if number not in used)
    return Matching(tuple(pairs), by_position, tuple(missing), left_over, mismatched)


def _find_difference(leaf: StoredLeaf, target: TargetLeaf, *, cast: bool) -> str:
    if leaf.shape == target.shape and (leaf.dtype == target.dtype or cast):
        return ""
    found, expected = f"{leaf.dtype}{list(leaf.shape)}", f"{target.dtype}{list(target.shape)}"
    origin = "" if leaf.name == target.name else f" as {leaf.name}"
    if leaf.shape != target.shape:
        return f"the checkpoint holds {found}{origin}, expected {expected}; was the layer resized?"
    return f"the checkpoint holds {found}{origin}, expected {expected}; pass cast=True to convert it"


def is_forgivable(path: Path) -> bool:
    """Returns whether a leaf may be missing or left over: metrics start anew in each epoch, seeds go with layers."""
    return path[0] == METRICS_GROUP or path[-1] == _SEED
