"""What one training process writes of an Orbax step: its chunks, in a database of its own, which nobody reads yet.

It stays under a temporary name until the process that commits takes the database over. Beside it lies a note of what
was written, for the trainer.
"""

from __future__ import annotations

import hashlib
import mmap
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offstep import commit, manifest
from offstep.finiteness import counted_beside, float_table
from offstep.formats.orbax_directory import ArrayItem, database_files, prepare_item
from offstep.records import Job, Plan

NOTE_NAME = "share.json"
"""The note, a manifest of the share alone."""

_IO_THREADS = 2


@dataclass(frozen=True)
class PreparedShare:
    """What is the same in each share of one plan.

    Attributes:
        process: Which one writes it.
        item: The database; `None` where the process has nothing to write.
        own_floats: Where the floating leaves lie that no other process writes.
    """

    process: int
    item: ArrayItem | None
    own_floats: bytes


def item_name(process: int) -> str:
    """Returns the name of a process's database."""
    return f"ocdbt.process_{process}"


def data_file(key: str, process: int) -> str:
    """Returns the name of a process's data file in its database, which each process can work out.

    Args:
        key: Tells the save from all others, in all runs.
        process: Whose it is.
    """
    return f"d/{hashlib.blake2b(f'{key}/{process}'.encode(), digest_size=16).hexdigest()}"


def staging_path(job: Job) -> Path:
    """Returns where the share of a job is until it is committed."""
    return commit.staging_path(Path(job.target), job.tag)


def prepare(plan: Plan, documents: dict[str, Any] | None) -> PreparedShare:  # JSON
    """Makes what is the same in each share of one plan; the documents are `{"process": int}`."""
    assert documents is not None
    process = documents["process"]
    own = tuple(layout for layout in plan.leaves if layout.chunk_count)
    item = prepare_item(item_name(process), replace(plan, leaves=own)) if own else None
    return PreparedShare(process, item, float_table(plan))


def write(job: Job, prepared: PreparedShare, slot: mmap.mmap, attachments: Mapping[str, mmap.mmap]) -> int:
    """Makes one snapshot's share durable under its temporary name; returns the bytes that were written.

    Raises:
        OSError: it is not durable, and nothing of it is left.
    """
    assert not attachments, "they are committed with the step"
    target = Path(job.target)
    commit.make_root(Path(job.root))
    with commit.StagedDirectory(target, tag=job.tag, private=job.private) as staged, memoryview(slot) as view:
        with counted_beside(view, prepared.own_floats) as nonfinite:
            files = {}
            if prepared.item is not None:
                name = data_file(job.key, prepared.process)
                files = database_files(prepared.item, (view,), time.time_ns(), data_file=name)
            records = manifest.record_files(files)
            sizes = staged.write(files, io_threads=_IO_THREADS)
            del files  # they refer to the slot
        text = manifest.build(job.manifest, records, nonfinite())
        staged.write({NOTE_NAME: (text,)})
        staged.keep()
    return sum(sizes.values())
