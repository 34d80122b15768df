"""Whether a checkpoint is what was written: its structure, the sizes of its files, every checksum there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from offstep import catalog
from offstep.discovery import READ_THREADS, open_checkpoint
from offstep.errors import CheckpointDamaged, UnsupportedFormat
from offstep.formats.orbax_reader import OrbaxReader
from offstep.stored import Reader, StoredLeaf


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        path: The checkpoint.
        problems: What is wrong, one sentence each; empty when it is whole.
        leaves: How many there are.
        size_bytes: Of their values.
        covered: What has checksums: `"every value"`, `"the index"` or `"nothing"`.
    """

    path: Path
    problems: tuple[str, ...]
    leaves: int = 0
    size_bytes: int = 0
    covered: str = "nothing"


def check(path: Path) -> Verdict:
    """Reads one checkpoint as a whole, piece by piece, and compares every checksum.

    Raises:
        CheckpointNotFound: there is nothing.
        UnsupportedFormat: it is no checkpoint, or one of a newer version.
        OSError: it cannot be read.
    """
    try:
        reader = open_checkpoint(path)
    except CheckpointDamaged as error:
        return Verdict(path, (str(error),))
    try:
        problems = (*_find_fault(reader), *_find_damage(reader))
        size = sum(leaf.size_bytes for leaf in reader.contents.leaves)
        return Verdict(path, problems, len(reader.contents.leaves), size, _describe_cover(reader))
    finally:
        reader.close()


def check_step(path: Path) -> Verdict:
    """Does as `check`, where the place says that a checkpoint has to be here: that it is none is a problem of it."""
    try:
        return check(path)
    except UnsupportedFormat as error:
        return Verdict(path, (str(error),))


def _find_fault(reader: Reader) -> list[str]:
    """Returns what is wrong with the files beside the arrays."""
    if not reader.contents.manifest or reader.contents.format != "orbax_directory":
        return []
    fault = catalog.find_fault(reader.path)
    return [] if fault is None else [fault]


def _find_damage(reader: Reader) -> list[str]:
    try:
        reader.verify(reader.contents.leaves, READ_THREADS)
    except CheckpointDamaged as error:
        if reader.contents.format == "keras_archive":
            return [str(error)]  # the archive has one checksum for all leaves
    else:
        return []
    return [str(problem) for leaf in reader.contents.leaves for problem in _find_leaf_damage(reader, leaf)]


def _find_leaf_damage(reader: Reader, leaf: StoredLeaf) -> list[CheckpointDamaged]:
    try:
        reader.verify([leaf], 1)
    except CheckpointDamaged as error:
        return [error]
    return []


def _describe_cover(reader: Reader) -> str:
    if isinstance(reader, OrbaxReader):
        return "every value" if reader.is_direct else "the index"
    return "every value" if reader.contents.format == "keras_archive" else "nothing"
