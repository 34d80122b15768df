"""How two checkpoints differ, in structure and in values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from offstep.blocks import split_leaf, widen
from offstep.stored import Reader, Region, StoredLeaf


@dataclass(frozen=True)
class Difference:
    """How one leaf differs.

    Attributes:
        name: The leaf.
        kind: `"only in A"`, `"only in B"`, `"shape or dtype"` or `"values"`.
        count: How many values differ.
        max_abs: Greatest absolute difference; infinite where only one side is finite, or the sign of infinity differs.
        max_rel: Greatest difference relative to the greater magnitude of both; 2 at most for finite values.
        text: The two sides, where their structure differs.
    """

    name: str
    kind: str
    count: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    text: str = ""


def compare(a: Reader, b: Reader, *, atol: float = 0.0, rtol: float = 0.0) -> list[Difference]:
    """Returns the leaves that differ: those of the structure first, then by the greatest absolute difference.

    Values are equal where |a - b| <= atol + rtol * max(|a|, |b|); NaN equals NaN. Both checkpoints are read piece by
    piece.

    Raises:
        CheckpointDamaged: a checksum is wrong.
    """
    leaves_a, leaves_b = _by_name(a.contents.leaves), _by_name(b.contents.leaves)
    found = [
        Difference(name, "only in A", text=spell(leaves_a[name])) for name in sorted(set(leaves_a) - set(leaves_b))
    ]
    found += [
        Difference(name, "only in B", text=spell(leaves_b[name])) for name in sorted(set(leaves_b) - set(leaves_a))
    ]
    for name in sorted(set(leaves_a) & set(leaves_b)):
        difference = _compare_leaf(a, leaves_a[name], b, leaves_b[name], atol, rtol)
        if difference is not None:
            found.append(difference)
    return sorted(found, key=lambda difference: (difference.kind == "values", -difference.max_abs, difference.name))


def spell(leaf: StoredLeaf) -> str:
    """Returns dtype and shape of a leaf as text, e.g. `float32[3, 4]`."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def _by_name(leaves: Iterable[StoredLeaf]) -> dict[str, StoredLeaf]:
    return {leaf.name: leaf for leaf in leaves}


def _compare_leaf(
    a: Reader, leaf_a: StoredLeaf, b: Reader, leaf_b: StoredLeaf, atol: float, rtol: float
) -> Difference | None:
    if (leaf_a.shape, leaf_a.dtype) != (leaf_b.shape, leaf_b.dtype):
        return Difference(leaf_a.name, "shape or dtype", text=f"{spell(leaf_a)} and {spell(leaf_b)}")
    count, max_abs, max_rel = 0, 0.0, 0.0
    for region in split_leaf(leaf_a):
        left = a.read([region], 1)[0]
        right = b.read([Region(leaf_b, region.span)], 1)[0]
        if left.tobytes() == right.tobytes():
            continue
        here = _compare_values(widen(left), widen(right), atol, rtol)
        count, max_abs, max_rel = count + here[0], max(max_abs, here[1]), max(max_rel, here[2])
    return Difference(leaf_a.name, "values", count, max_abs, max_rel) if count else None


def _compare_values(left: np.ndarray, right: np.ndarray, atol: float, rtol: float) -> tuple[int, float, float]:
    """Returns how many values differ, by how much at most, and by how much relatively."""
    with np.errstate(all="ignore"):
        kind = np.complex128 if left.dtype.kind == "c" else np.float64
        unequal = (left != right) & ~((left != left) & (right != right))  # noqa: PLR0124  NaN is what is not itself
        first, second = left[unequal].astype(kind), right[unequal].astype(kind)
        gap = np.abs(first - second)
        gap[~np.isfinite(gap)] = math.inf
        scale = np.maximum(np.abs(first), np.abs(second))
        differs = gap > np.where(np.isfinite(scale), atol + rtol * scale, atol)
        if left.dtype.kind in "iub" and not (atol or rtol):
            differs[:] = True  # integers beyond 2**53 may be one and the same as floats
        relative = np.where(np.isfinite(gap) & (scale > 0), gap / scale, gap)
    if not differs.any():
        return 0, 0.0, 0.0
    return int(differs.sum()), float(gap[differs].max()), float(relative[differs].max())
