"""Where a format that is a single file puts it: into a file system, or into a store."""

from __future__ import annotations

from offstep import commit
from offstep.records import Job
from offstep.stores.address import Address, to_place
from offstep.stores.staging import StagedObject


def stage_file(job: Job, size_bytes: int) -> commit.StagedFile | StagedObject:
    """Opens the file that a job asks for, to be written piece by piece and committed.

    Args:
        job: Its target is the file.
        size_bytes: What it will measure, unless `commit` says otherwise.

    Raises:
        OSError: it cannot be made.
    """
    target = to_place(job.target)
    if isinstance(target, Address):
        return StagedObject(target, size_bytes=size_bytes, patience_seconds=job.retry_seconds)
    commit.make_root(target.parent)
    return commit.StagedFile(target, size_bytes=size_bytes, tag=job.tag, private=job.private)
