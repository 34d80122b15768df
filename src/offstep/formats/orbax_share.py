"""What one training process writes of an Orbax step: its chunks, in a database of its own, which nobody reads yet.

It stays under a temporary name until the process that commits takes the database over.
"""

from __future__ import annotations

import hashlib
import mmap
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from offstep import commit, manifest, temporary_names
from offstep.finiteness import counted_beside, float_table
from offstep.formats import orbax_share_objects
from offstep.formats.orbax_directory import database_files, prepare_item
from offstep.formats.orbax_share_objects import PreparedShare, item_name
from offstep.records import Job, Plan, Share
from offstep.stores.address import Address, to_place

_IO_THREADS = 2


def data_file(key: str, process: int) -> str:
    """Returns the name of a process's data file in its database, which each process can work out.

    Args:
        key: Tells the save from all others, in all runs.
        process: Whose it is.
    """
    return f"d/{hashlib.blake2b(f'{key}/{process}'.encode(), digest_size=16).hexdigest()}"


def staging_path(job: Job) -> Path:
    """Returns where the share of a job is until it is committed."""
    return temporary_names.staging_path(Path(job.target), job.tag)


def prepare(plan: Plan, documents: dict[str, Any] | None) -> PreparedShare:  # JSON
    """Makes what is the same in each share of one plan; the documents are `{"process": int, "commits": bool}`."""
    assert documents is not None
    process = documents["process"]
    own = tuple(layout for layout in plan.leaves if layout.chunk_count)
    item = prepare_item(item_name(process), replace(plan, leaves=own)) if own else None
    return PreparedShare(process, documents["commits"], item, float_table(plan))


def write(job: Job, prepared: PreparedShare, slot: mmap.mmap, attachments: Mapping[str, mmap.mmap]) -> Share:
    """Makes one snapshot's share durable under its temporary name, or in pieces in a store.

    The note has `files`, by name their sizes and checksums (in a store of the attachments only, and `pieces`, the sizes
    of the objects before these), and `nonfinite`, how many values are NaN or infinite.

    The attachments lie beside the database.

    Raises:
        OSError: it is not durable, and nothing of it is left.
    """
    target = to_place(job.target)
    if isinstance(target, Address):
        return orbax_share_objects.write(job, target, prepared, slot, attachments)
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
        for name, buffer in attachments.items():
            with memoryview(buffer) as content:
                attached = {name: (content,)}
                records |= manifest.record_files(attached)
                sizes |= staged.write(attached)
                del attached
        wrong = nonfinite()
        staged.keep()
    listed = {name: (record.size, record.crc32c) for name, record in records.items()}
    return Share(sum(sizes.values()), {"files": listed, "nonfinite": wrong})
