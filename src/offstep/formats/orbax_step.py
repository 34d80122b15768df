"""One step of an Orbax root: from leaves to a plan, and from a slot to a committed directory."""

from __future__ import annotations

import mmap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offstep import commit, manifest
from offstep.finiteness import counted_beside
from offstep.formats import orbax_directory, orbax_objects
from offstep.formats.base_file import BaseFile, Split
from offstep.manifest import FileRecord
from offstep.plans import make_plan
from offstep.records import Job, Leaf, PathKey, Plan
from offstep.stores.address import Address, to_place

_IO_THREADS = 2


def place(leaves: Sequence[Leaf], empty_nodes: Sequence[tuple[tuple[PathKey, ...], str]]) -> Plan:
    """Gives each leaf its place in a slot.

    Raises:
        UnsupportedLeaf: a leaf that stock Orbax could not read back.
    """
    orbax_directory.check_leaves(leaves)
    return make_plan(leaves, empty_nodes)


def prepare(
    plan: Plan,
    documents: dict[str, Any] | None,  # JSON
    *,
    state: orbax_directory.ArrayItem | None = None,
) -> orbax_directory.PreparedDirectory:
    """Makes what is the same in every checkpoint of one plan; `state` in place of a database with the slot."""
    if documents is None:
        return orbax_directory.prepare(plan, None, state=state)
    assets = {name: bytes.fromhex(text) for name, text in documents["assets"].items()}
    return orbax_directory.prepare(plan, orbax_directory.ModelDocuments(documents["config"], assets), state=state)


def write(
    job: Job,
    prepared: orbax_directory.PreparedDirectory,
    slot: mmap.mmap,
    attachments: Mapping[str, mmap.mmap],
) -> int:
    """Writes one snapshot and commits it; returns the bytes of all files that were written, and not just linked.

    Raises:
        OSError: it is not durable; nothing that was there before is touched.
    """
    target = to_place(job.target)
    if isinstance(target, Address):
        return orbax_objects.write(job, target, prepared, slot, attachments)
    commit.make_root(Path(job.root))
    commit.refuse_foreign(target)
    with commit.StagedDirectory(target, tag=job.tag, private=job.private) as staged, memoryview(slot) as view:
        with counted_beside(view, prepared.float_table) as nonfinite:
            split, linked = _split(staged, job, prepared.base, view)
            files = orbax_directory.data_files(
                prepared, view, step=job.step, target=job.target, now_ns=time.time_ns(), split=split
            )
            records = manifest.record_files(files)
            sizes = staged.write(files, io_threads=_IO_THREADS)
            del files  # they refer to the slot
        for name, buffer in attachments.items():
            with memoryview(buffer) as content:
                files = {name: (content,)}
                records |= manifest.record_files(files)
                sizes |= staged.write(files)
                del files
        records |= {name: FileRecord(size) for name, size in linked.items()}
        text = manifest.build(job.manifest, records, nonfinite())
        sizes |= staged.write({manifest.MANIFEST_NAME: (text,)})
        staged.commit()
    if prepared.base is not None and split is not None:
        file = None if split.base is None else commit.identify(target / orbax_directory.base_path(split))
        prepared.base.remember(split, file)
    return sum(sizes.values())


def write_nothing(job: Job, prepared: object, slot: mmap.mmap, attachments: Mapping[str, mmap.mmap]) -> int:
    """Takes the place of `write` where the step is there already, and only older ones are to go."""
    assert not attachments
    return 0


def _split(
    staged: commit.StagedDirectory, job: Job, base: BaseFile | None, slot: memoryview
) -> tuple[Split | None, dict[str, int]]:
    """Spreads the slot over two files, and links the one that is there already: its name and size are returned."""
    if base is None:
        return None, {}
    split = base.split(slot, full_every=job.full_every)
    if not split.is_linked or base.file is None:
        return split, {}
    name = orbax_directory.base_path(split)
    try:
        return split, {name: staged.link(name, base.file)}
    except OSError:  # deleted with its checkpoint, too many links, another file system, or one without links
        return base.split_anew(slot), {}
