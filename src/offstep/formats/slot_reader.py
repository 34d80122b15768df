"""Reads arrays out of a slot, as if it were a checkpoint: chunk by chunk, each against its CRC-32C."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offstep.errors import UnsupportedFormat
from offstep.formats.image_reader import ImageReader
from offstep.formats.ocdbt_index import FileRange, Index
from offstep.formats.orbax_directory import leaf_entries
from offstep.records import LeafLayout, Plan
from offstep.stored import Contents, Region, StoredLeaf

_DESCRIPTORS = Path("/proc/self/fd")


class SlotReader:
    """The arrays of a snapshot in shared memory; a `stored.Reader`.

    Args:
        path: What the snapshot would be called on the disk.
        plan: How it is laid out.
        descriptor: The slot's memfd; it stays the caller's.
        manifest: What the trainer said of the snapshot.

    Raises:
        CheckpointDamaged: the slot is smaller than the plan says.
    """

    is_checked_fast = False  # each chunk is checked when it is read, and that is all there is to read

    def __init__(self, path: Path, plan: Plan, descriptor: int, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self._arrays = ImageReader(_DESCRIPTORS, _index(plan, str(descriptor)))
        leaves = tuple(self._describe(layout) for layout in plan.leaves)
        self.contents = Contents("orbax_directory", leaves, is_ordered=True, manifest=manifest)
        self._names = {layout.leaf.path: layout.leaf.name for layout in plan.leaves}

    def read(
        self, regions: Sequence[Region], threads: int, into: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """Returns the regions; see `stored.Reader`."""
        return self._arrays.read([(self._names[region.leaf.path], region) for region in regions], threads, into)

    def verify(self, leaves: Sequence[StoredLeaf], threads: int) -> None:
        """Checks the checksums of leaves; see `stored.Reader`."""
        self._arrays.verify([(self._names[leaf.path], leaf) for leaf in leaves], threads)

    @property
    def file(self) -> Path:
        """A snapshot is no file of Keras."""
        raise UnsupportedFormat(f"{self.path} is in memory; expected a file of Keras")

    def close(self) -> None:
        """Closes what it has opened."""
        self._arrays.close()

    def _describe(self, layout: LeafLayout) -> StoredLeaf:
        leaf, array = layout.leaf, self._arrays.arrays[layout.leaf.name]
        return StoredLeaf(leaf.path, array.shape, array.dtype, leaf.value_type, leaf.prng_impl)


def _index(plan: Plan, file: str) -> Index:
    entries = (entry for layout in plan.leaves for entry in leaf_entries(layout))
    return {
        key: value if isinstance(value, bytes) else FileRange(file, value.offset, value.size) for key, value in entries
    }
