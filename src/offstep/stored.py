"""What a checkpoint on disk holds, whatever its format: the records, and what every reader offers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from offstep.records import PathKey
from offstep.stores.path import Readable

Span = tuple[tuple[int, int], ...]
"""A box in an array: start and stop along each axis."""


@dataclass(frozen=True)
class StoredLeaf:
    """One array of a checkpoint.

    Attributes:
        path: Keys from the root of the tree, e.g. `("trainable_variables", "d1", "kernel")`.
        shape: Global shape, of the raw words where it is an array of PRNG keys.
        dtype: NumPy (or ml_dtypes) name.
        value_type: What Orbax calls it: `"jax.Array"`, `"np.ndarray"` or `"scalar"`.
        prng_impl: Name of the PRNG implementation of a key array, else `None`.
    """

    path: tuple[PathKey, ...]
    shape: tuple[int, ...]
    dtype: str
    value_type: str = "jax.Array"
    prng_impl: str | None = None

    @property
    def name(self) -> str:
        """The path joined by slashes."""
        return "/".join(map(str, self.path))

    @property
    def size_bytes(self) -> int:
        return _size_of(self.shape, self.dtype)


@dataclass(frozen=True)
class Region:
    """A part of a stored leaf that somebody wants; `span` covers the whole leaf where it is `None`."""

    leaf: StoredLeaf
    span: Span | None = None

    @property
    def is_whole(self) -> bool:
        return self.span is None or self.span == whole(self.leaf.shape)

    @property
    def box(self) -> Span:
        return whole(self.leaf.shape) if self.span is None else self.span

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * as_dtype(self.leaf.dtype).itemsize


@dataclass(frozen=True)
class Contents:
    """What a reader found.

    Attributes:
        format: `"orbax_directory"`, `"keras_weights"`, `"keras_archive"` or `"keras_legacy"`.
        leaves: In the order of the state where `is_ordered`, else sorted by name.
        is_ordered: Whether the order of the leaves says which is which when names differ.
        manifest: The fields of `manifest.Manifest` as the checkpoint has them; empty for checkpoints of others.
        others: What the tree has beside arrays, with Orbax's name of its type: empty containers, mostly.
    """

    format: str
    leaves: tuple[StoredLeaf, ...]
    is_ordered: bool = False
    manifest: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[tuple[tuple[PathKey, ...], str], ...] = ()


class Reader(Protocol):
    """An open checkpoint. Any thread may read; close it when done."""

    contents: Contents

    @property
    def path(self) -> Readable:
        """The checkpoint."""

    @property
    def file(self) -> Path:
        """The file of this machine that is read, a copy where the checkpoint is in a store; only of a single file."""

    @property
    def is_checked_fast(self) -> bool:
        """Whether `verify` costs much less than reading everything, so that it can go before."""

    def read(
        self, regions: Sequence[Region], threads: int, into: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """Returns the regions as C-contiguous arrays, checking every checksum there is.

        The arrays are those of `into`, of the right shape and dtype, if given. Else they may be views of shared
        memory, which lives as long as one of them.

        Raises:
            CheckpointDamaged: naming the leaf.
        """

    def verify(self, leaves: Sequence[StoredLeaf], threads: int) -> None:
        """Checks the checksums of leaves without keeping anything.

        Raises:
            CheckpointDamaged: naming the leaf.
        """

    def close(self) -> None: ...


@lru_cache(maxsize=4096)  # thousands of leaves have a few dozen shapes
def _size_of(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * as_dtype(dtype).itemsize


@lru_cache  # thousands of leaves have a handful of dtypes
def as_dtype(name: str) -> np.dtype:
    """Returns the NumPy dtype of that name, those of ml_dtypes included."""
    return np.dtype(getattr(ml_dtypes, name, name))


def whole(shape: tuple[int, ...]) -> Span:
    """Returns the box that covers an array of this shape."""
    return tuple((0, size) for size in shape)
