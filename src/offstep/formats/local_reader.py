"""Reads a step of which several processes have written what they held, each to a disk of its own.

Which of these directories are in reach does not matter as long as what is asked for is: on its own host each process
finds its part, and where all are brought together everything is there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from offstep import catalog, manifest
from offstep.errors import CheckpointDamaged, UnsupportedFormat
from offstep.formats.image_reader import ImageReader
from offstep.formats.ocdbt_index import FileRange, Index, read_index
from offstep.formats.orbax_reader import OrbaxReader, find_item
from offstep.manifest import Manifest
from offstep.stored import Region, StoredLeaf

_PART_NAME = re.compile(r"process_(0|[1-9][0-9]*)")


def list_parts(root: Path) -> list[Path]:
    """Returns the directories of processes in `root`, in their order; none where each step is one directory."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _PART_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def list_common_steps(parts: Sequence[Path]) -> dict[int, Manifest]:
    """Returns the steps that are whole in all these directories, in ascending order: others were never durable.

    Nor was one that is of another save on one disk than on another: all have gone on from an older step, and some were
    killed before they came to this one again.
    """
    found = [dict(_list_manifests(part)) for part in parts]
    common = set.intersection(*(set(steps) for steps in found)) if found else set()
    return {step: found[0][step] for step in sorted(common) if len({steps[step].save for steps in found}) == 1}


def list_saves(parts: Sequence[Path]) -> dict[int, list[Manifest]]:
    """Returns the steps that any of these directories has, in ascending order, each with the manifests of its parts."""
    found: dict[int, list[Manifest]] = {}
    for part in parts:
        for step, written in _list_manifests(part):
            found.setdefault(step, []).append(written)
    return dict(sorted(found.items()))


def _list_manifests(part: Path) -> Iterator[tuple[int, Manifest]]:
    for step in catalog.list_steps(part):
        written = manifest.read(part / str(step))
        if written is not None:
            yield step, written


class LocalReader:
    """The arrays of one step in the directories of several processes; a `stored.Reader`.

    Args:
        root: Directory of the processes' directories.
        step: Which step of all of them.
        save: Of which save, where some of them may have the step of another one; `None` takes all.

    Raises:
        CheckpointDamaged: one is not what was written, or they are not of one step.
    """

    def __init__(self, root: Path, step: int, save: str | None = None) -> None:
        self.path = root
        checkpoints = [part / str(step) for part in list_parts(root)]
        if save is not None:
            checkpoints = [path for path in checkpoints if (read := manifest.read(path)) and read.save == save]
        if not checkpoints:
            raise CheckpointDamaged(f"step {step} is gone from {root}; restore another step")
        with closing(OrbaxReader(checkpoints[0])) as first:
            self.contents = first.contents
        self._names = {leaf.path: ".".join(map(str, leaf.path)) for leaf in self.contents.leaves}
        index: Index = {}
        for checkpoint in checkpoints:
            index |= _read_index(checkpoint)
        self._arrays = ImageReader(root, index)

    @property
    def is_checked_fast(self) -> bool:
        """Whether `verify` costs much less than reading; see `stored.Reader`."""
        return True

    @property
    def file(self) -> Path:
        """A directory is no single file."""
        raise UnsupportedFormat(f"{self.path} is a directory; expected a file of Keras")

    def read(
        self, regions: Sequence[Region], threads: int, into: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """Returns the regions; see `stored.Reader`."""
        return self._arrays.read([(self._names[region.leaf.path], region) for region in regions], threads, into)

    def verify(self, leaves: Sequence[StoredLeaf], threads: int, *, is_partial: bool = True) -> None:
        """Checks the checksums of what is in reach; see `stored.Reader`. Without `is_partial` all has to be."""
        self._arrays.verify([(self._names[leaf.path], leaf) for leaf in leaves], threads, is_partial=is_partial)

    def close(self) -> None:
        """Closes its files."""
        self._arrays.close()


def _read_index(checkpoint: Path) -> Index:
    """Returns the index of one process, which names its data files by absolute paths."""
    item = find_item(checkpoint)
    if item is None:
        raise CheckpointDamaged(f"{checkpoint} holds no arrays; restore another step")
    return {
        key: value._replace(file=os.path.abspath(f"{item}/{value.file}")) if isinstance(value, FileRange) else value
        for key, value in read_index(item).items()
    }
