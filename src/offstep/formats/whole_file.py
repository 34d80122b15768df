"""A file that the trainer has made itself: the slot holds its bytes."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from offstep import commit
from offstep.records import Job, Plan

_IO_THREADS = 2


def prepare(plan: Plan, documents: dict[str, Any] | None) -> None:
    """Does nothing: there is no part that all files have in common."""


def write(job: Job, prepared: None, slot: mmap.mmap) -> int:
    """Writes the file and commits it in place of an older one; returns its size in bytes.

    Raises:
        OSError: it is not durable; an older file is untouched.
    """
    assert job.file_bytes is not None
    target = Path(job.target)
    commit.make_root(target.parent)
    with (
        commit.StagedFile(target, size_bytes=job.file_bytes, tag=job.tag, private=job.private) as staged,
        memoryview(slot) as view,
    ):
        staged.write(view, 0, io_threads=_IO_THREADS)
        staged.commit()
    return job.file_bytes
