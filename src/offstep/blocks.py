"""Leaves read piece by piece, so that a checkpoint may be larger than the memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from offstep.stored import Reader, Region, Span, StoredLeaf, as_dtype, whole

BLOCK_BYTES = 64 << 20


def read_blocks(reader: Reader, leaf: StoredLeaf, *, block_bytes: int = BLOCK_BYTES) -> Iterator[np.ndarray]:
    """Yields the values of a leaf in C order, as arrays of about `block_bytes` at most.

    Raises:
        CheckpointDamaged: a checksum is wrong.
    """
    for region in split_leaf(leaf, block_bytes=block_bytes):
        yield reader.read([region], 1)[0]


def split_leaf(leaf: StoredLeaf, *, block_bytes: int = BLOCK_BYTES) -> Iterator[Region]:
    """Cuts a leaf into regions that follow each other in C order."""
    limit = max(1, block_bytes // as_dtype(leaf.dtype).itemsize)
    for span in _split(whole(leaf.shape), 0, limit):
        yield Region(leaf, span)


def widen(values: np.ndarray) -> np.ndarray:
    """Returns the values in a dtype that NumPy itself knows: as they are, or exactly converted to a wider one."""
    if values.dtype.kind in "biufc" and values.dtype != np.float16:
        return values
    return values.astype(np.float32 if "float" in values.dtype.name else np.int32)


def _split(span: Span, axis: int, limit: int) -> Iterator[Span]:
    row = math.prod(stop - start for start, stop in span[axis + 1 :])
    if axis == len(span) or row * (span[axis][1] - span[axis][0]) <= limit:
        yield span
        return
    rows = max(1, limit // row)
    start, stop = span[axis]
    for at in range(start, stop, rows):
        part = (*span[:axis], (at, min(stop, at + rows)), *span[axis + 1 :])
        yield from _split(part, axis + 1, limit)
