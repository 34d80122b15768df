"""Whether a checkpoint, whatever its format, is what was written: it opens, and every checksum that it has is right."""

from __future__ import annotations

from dataclasses import dataclass

from offstep.discovery import open_checkpoint
from offstep.errors import CheckpointDamaged, CheckpointNotFound, UnsupportedFormat
from offstep.stores.path import Readable
from offstep.verification import verify


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        path: The checkpoint.
        problems: What is wrong, one sentence each; empty when it is whole.
        leaves: How many there are.
        checked_bytes: How many bytes were compared with a checksum.
        unchecked: What carries no checksum.
    """

    path: Readable
    problems: tuple[str, ...]
    leaves: int = 0
    checked_bytes: int = 0
    unchecked: tuple[str, ...] = ()


def check(path: Readable) -> Verdict:
    """Opens one checkpoint, reads it as a whole, piece by piece, and compares every checksum.

    Raises:
        CheckpointNotFound: there is nothing.
        UnsupportedFormat: it is no checkpoint, or one of a newer version.
        OSError: it cannot be read.
    """
    leaves, problems = 0, []
    try:
        reader = open_checkpoint(path)
        leaves = len(reader.contents.leaves)
        reader.close()
    except CheckpointDamaged as error:
        problems.append(str(error))
    report = verify(path)
    if report.problems:  # they say more
        problems = [str(problem) for problem in report.problems]
    return Verdict(path, tuple(problems), leaves, report.checked_bytes, report.unchecked)


def check_step(path: Readable) -> Verdict:
    """Does as `check`, where the place says that a checkpoint has to be here: that it is none is a problem of it."""
    try:
        return check(path)
    except (UnsupportedFormat, CheckpointNotFound) as error:
        return Verdict(path, (str(error),))
