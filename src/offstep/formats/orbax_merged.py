"""An Orbax step that several training processes have written: one index over all their databases, and one commit.

Only the primary process makes it, once the shares of all are durable. What lies where follows from the plan, so nothing
is asked of the others but that they are done.
"""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from offstep import commit, manifest
from offstep.formats import orbax_directory, orbax_merged_objects, orbax_share, orbax_step
from offstep.formats.ocdbt import Entry, SlotRange, prepare_database
from offstep.formats.orbax_directory import STATE, ArrayItem
from offstep.formats.orbax_merged_objects import PreparedStep, Report
from offstep.formats.orbax_share_objects import ITEM_PREFIX, item_name
from offstep.manifest import FileRecord
from offstep.records import CRC_BYTES, Job, LeafLayout, Plan
from offstep.stores.address import Address, to_place
from offstep.temporary_names import list_staged

REPORTS_NAME = "reports.json"
"""Attachment with what each process has reported of its share: too long for a message where there are thousands."""

Place = tuple[int, int]  # process, offset in its data file


def prepare(plan: Plan, documents: dict[str, Any] | None) -> PreparedStep:  # JSON
    """Makes what is the same in each step of one plan.

    The documents are `{"model": what an Orbax directory takes, "places": [process, offset] of each chunk of each leaf,
    "processes": int}`.
    """
    assert documents is not None
    places, processes = documents["places"], documents["processes"]
    entries = sorted(_list_entries(plan, places), key=lambda entry: entry[0])
    name_bytes = [len(_data_path("", process)) for process in range(processes)]
    database = prepare_database(entries, node_offset=0, other_file_bytes=name_bytes)
    item = ArrayItem(STATE, 0, tuple(entries), database)
    return PreparedStep(orbax_step.prepare(plan, documents["model"], state=item), item, processes)


def write(job: Job, prepared: PreparedStep, slot: mmap.mmap, attachments: Mapping[str, mmap.mmap]) -> int:
    """Commits the step whose shares are durable; returns the bytes that were written beside them.

    Raises:
        OSError: it is not durable; nothing that was there before is touched, but see `orbax_merged_objects.write`.
    """
    target = to_place(job.target)
    reports: list[Report] = json.loads(bytes(attachments[REPORTS_NAME]))
    if isinstance(target, Address):
        own = {name: buffer for name, buffer in attachments.items() if name != REPORTS_NAME}
        return orbax_merged_objects.write(job, target, prepared, reports, own)
    if _is_done(job, target, reports):
        return 0
    commit.refuse_foreign(target)
    # Of writers that died: they may have taken shares over already.
    attempts = list_staged(target, job.tag)
    tag = f"{job.tag}-{len(attempts)}"
    with commit.StagedDirectory(target, tag=tag, private=job.private) as staged:
        files = orbax_directory.document_files(
            prepared.directory, step=job.step, target=job.target, now_ns=time.time_ns()
        ) | _index_files(prepared, job.key)
        records = manifest.record_files(files)
        sizes = staged.write(files)
        for name, buffer in attachments.items():
            if name == REPORTS_NAME:
                continue
            with memoryview(buffer) as content:
                attached = {name: (content,)}
                records |= manifest.record_files(attached)
                sizes |= staged.write(attached)
                del attached
        for share in reports:
            records |= {_final_name(name): FileRecord(*record) for name, record in share["files"].items()}
        nonfinite = sum(share["nonfinite"] for share in reports)
        sizes |= staged.write({manifest.MANIFEST_NAME: (manifest.build(job.manifest, records, nonfinite),)})
        # Last: what fails before this can be tried again.
        for share in reports:
            for name in _names_in(share):
                final = _final_name(name)
                found = [Path(share["staged"], name), *(attempt / final for attempt in attempts)]
                staged.adopt(next((path for path in found if path.exists()), found[0]), final)
        staged.commit()
    for attempt in attempts:
        commit.discard(attempt)
    return sum(sizes.values())


def _names_in(share: Report) -> list[str]:
    """Returns what lies in a share: its database, and attachments beside it."""
    return sorted({name.partition("/")[0] for name in share["files"]})


def _final_name(name: str) -> str:
    """Returns where in the step a file of a share will be, or a database."""
    return f"{STATE}/{name}" if name.startswith(ITEM_PREFIX) else name


def _is_done(job: Job, target: Path, reports: list[Report]) -> bool:
    """Returns whether an earlier writer has committed it, and died before it could say so."""
    if all(Path(share["staged"]).is_dir() for share in reports):
        return False
    return is_committed(str(target), job.key, len(reports))


def is_committed(target: str, key: str, processes: int) -> bool:
    """Returns whether a checkpoint is the one that was saved under a key.

    Raises:
        OSError: a store does not answer.
    """
    place = to_place(target)
    if isinstance(place, Address):
        return orbax_merged_objects.is_committed(place, key)
    try:
        written = manifest.read(place)
    except (OSError, ValueError):
        return False
    names = () if written is None else written.files
    return any(f"{STATE}/{_data_path(key, process)}" in names for process in range(processes))


def _list_entries(plan: Plan, places: list[list[Place]]) -> Iterator[Entry]:
    for layout, of_leaf in zip(plan.leaves, places, strict=True):
        yield orbax_directory.zarr_key(layout), orbax_directory.encode_zarr(layout)
        yield from _list_chunks(layout, of_leaf)


def _list_chunks(layout: LeafLayout, places: list[Place]) -> Iterator[Entry]:
    for number, (process, offset) in enumerate(places):
        # The first data file is the index's own, which holds no values.
        yield (
            orbax_directory.chunk_key(layout.leaf.name, np.unravel_index(number, layout.grid)),
            SlotRange(offset, layout.chunk_bytes + CRC_BYTES, process + 1),
        )


def _data_path(key: str, process: int) -> str:
    return f"{item_name(process)}/{orbax_share.data_file(key, process)}"


def _index_files(prepared: PreparedStep, key: str) -> dict[str, orbax_directory.Parts]:
    others = [_data_path(key, process) for process in range(prepared.processes)]
    return orbax_directory.database_files(prepared.item, (), time.time_ns(), others)
