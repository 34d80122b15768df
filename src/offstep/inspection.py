"""What one checkpoint holds: its leaves, what is kept with them, and statistics of their values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from offstep.blocks import read_blocks, widen
from offstep.stored import Reader, StoredLeaf


@dataclass(frozen=True)
class Statistics:
    """Of the finite values of one leaf; of magnitudes where they are complex.

    Attributes:
        minimum: Smallest; `None` where there is none.
        maximum: Greatest; the same.
        mean: Their mean, summed in float64.
        nonfinite: How many values are NaN or infinite.
    """

    minimum: float | None
    maximum: float | None
    mean: float | None
    nonfinite: int


def select_leaves(leaves: Iterable[StoredLeaf], prefixes: Iterable[str]) -> list[StoredLeaf]:
    """Returns the leaves whose name begins with one of the prefixes, part by part; all where there is no prefix."""
    wanted = [prefix.strip("/") for prefix in prefixes]
    return [leaf for leaf in leaves if not wanted or any(_is_below(leaf.name, prefix) for prefix in wanted)]


def measure(reader: Reader, leaf: StoredLeaf) -> Statistics:
    """Reads a leaf piece by piece.

    Raises:
        CheckpointDamaged: a checksum is wrong.
    """
    low, high, total, count, nonfinite = math.inf, -math.inf, 0.0, 0, 0
    for block in read_blocks(reader, leaf):
        values = widen(block)
        values = np.abs(values) if values.dtype.kind == "c" else values
        finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values.reshape(-1)
        nonfinite += values.size - finite.size
        if finite.size:
            low, high = min(low, finite.min().item()), max(high, finite.max().item())
            total += float(finite.sum(dtype=np.float64))
            count += finite.size
    if not count:
        return Statistics(None, None, None, nonfinite)
    return Statistics(low, high, total / count, nonfinite)


def _is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}/")
