"""An Orbax step in an object store that several training processes have written: one index over their objects, and one
commit by the last object, which is created only if there is none.

Only the primary process makes it, once all have reported that their objects are there.
"""

from __future__ import annotations

import mmap
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

from offstep import manifest
from offstep.formats.ocdbt import Entry, SlotRange, prepare_database
from offstep.formats.orbax_directory import STATE, ArrayItem, PreparedDirectory, database_files, document_files
from offstep.formats.orbax_share_objects import may_be_on_its_way, name_pieces
from offstep.manifest import FileRecord
from offstep.records import Job
from offstep.stores.address import Address
from offstep.stores.staging import MARKER_NAME, Source, StagedObjects, holds_marker

_LOOK_SECONDS = 5.0

Report = dict[str, Any]  # JSON
Sizes = tuple[tuple[int, ...], ...]  # of the pieces of each process


@dataclass(frozen=True)
class PreparedStep:
    """What is the same in each step of one plan.

    Attributes:
        directory: All but the arrays of the state.
        item: The index over all databases, each of which has its process's slot in one file.
        processes: How many there are.
        indexes: The index over the objects in a store, by their sizes.
    """

    directory: PreparedDirectory
    item: ArrayItem
    processes: int
    indexes: dict[Sizes, ArrayItem] = field(default_factory=dict)


def write(
    job: Job, target: Address, prepared: PreparedStep, reports: list[Report], attachments: Mapping[str, mmap.mmap]
) -> int:
    """Commits the step whose objects are there; returns the bytes that were written beside them.

    Raises:
        OSError: it is not durable, or nobody can tell; what was there before is touched only if it has the same step.
        FileNotFoundError: objects that were reported are gone.
    """
    nonce = _make_nonce(job.key)
    sizes = tuple(tuple(report["pieces"]) for report in reports)
    with StagedObjects(
        target, nonce=nonce, patience_seconds=job.retry_seconds, is_spared=partial(may_be_on_its_way, key=job.key)
    ) as staged:
        pieces, attached = _list_pieces(job.key, sizes), _list_attached(job.key, reports)
        staged.adopt(f"{STATE}/{name}" for name in pieces)
        staged.copy(attached)
        now_ns = time.time_ns()
        files = document_files(prepared.directory, step=job.step, target=target.plain, now_ns=now_ns)
        files[MARKER_NAME] = (*files[MARKER_NAME], b"\n", nonce)
        files |= database_files(_index(prepared, sizes, list(pieces)), (), now_ns, list(pieces))
        files |= {name: (buffer[:],) for name, buffer in attachments.items()}
        records = manifest.record_files(files) | {f"{STATE}/{name}": FileRecord(size) for name, size in pieces.items()}
        records |= {name: FileRecord(size, crc) for name, (_, size, crc) in attached.items()}
        written = staged.write(files)
        text = manifest.build(job.manifest, records, sum(report["nonfinite"] for report in reports))
        written |= staged.write({manifest.MANIFEST_NAME: (text,)})
        staged.commit()
    return sum(written.values())


def is_committed(target: Address, key: str) -> bool:
    """Returns whether a checkpoint is the one that was saved under a key.

    Raises:
        OSError: the store does not answer.
    """
    return holds_marker(target, _make_nonce(key), _LOOK_SECONDS)


def _make_nonce(key: str) -> bytes:
    return key.encode()


def _list_pieces(key: str, sizes: Sizes) -> dict[str, int]:
    """Returns the sizes of all objects by their names."""
    return {
        name: size
        for process, of_process in enumerate(sizes)
        for name, size in zip(name_pieces(key, process, len(of_process)), of_process, strict=True)
    }


def _list_attached(key: str, reports: list[Report]) -> dict[str, Source]:
    """Returns by the name of each attachment where it lies."""
    return {
        name: (f"{STATE}/{source}", *record)
        for process, report in enumerate(reports)
        for source, (name, record) in zip(_name_attached(key, process, report), report["files"].items(), strict=True)
    }


def _name_attached(key: str, process: int, report: Report) -> list[str]:
    count = len(report["pieces"])
    return name_pieces(key, process, count + len(report["files"]))[count:]


def _index(prepared: PreparedStep, sizes: Sizes, names: list[str]) -> ArrayItem:
    if sizes not in prepared.indexes:
        prepared.indexes.clear()
        entries = tuple(_move(prepared.item.entries, sizes))
        lengths = [len(name) for name in names]
        database = prepare_database(entries, node_offset=0, other_file_bytes=lengths)
        prepared.indexes[sizes] = replace(prepared.item, entries=entries, database=database)
    return prepared.indexes[sizes]


def _move(entries: tuple[Entry, ...], sizes: Sizes) -> Iterator[Entry]:
    """Turns ranges of the slots into those of the objects.

    Raises:
        ValueError: a chunk is not in one object.
    """
    ends = [[0, *accumulate(of_process)] for of_process in sizes]
    firsts = list(accumulate(map(len, sizes), initial=1))
    for key, value in entries:
        if isinstance(value, bytes):
            yield key, value
            continue
        process = value.file - 1  # the first data file is the index's own, which holds no values
        number = bisect_right(ends[process], value.offset) - 1
        start, *rest = ends[process][number : number + 2]
        if not rest or value.offset + value.size > rest[0]:
            raise ValueError(f"process {process} has put {key.decode()} into no object, or into two")
        yield key, SlotRange(value.offset - start, value.size, firsts[process] + number)
