"""Copies a committed step from a file system into a store: the data files in pieces, everything else as it is."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

from offstep import manifest
from offstep._native import crc32c
from offstep.formats.ocdbt import DATA_FILE_BYTES, Entry, SlotRange, prepare_database
from offstep.formats.ocdbt_index import FileRange, Index, read_index
from offstep.formats.orbax_directory import STATE, Parts, name_data_file
from offstep.formats.orbax_objects import PIECE_BYTES
from offstep.manifest import Manifest
from offstep.records import Job
from offstep.stores.address import parse_address
from offstep.stores.staging import MARKER_NAME, StagedObjects

_Piece = tuple[str, int, int]  # data file, start, stop


def write(job: Job, prepared: None, slot: mmap.mmap, attachments: Mapping[str, mmap.mmap]) -> int:
    """Copies the directory `job.source` to `job.target` and commits it there; returns the bytes of all objects.

    Raises:
        FileNotFoundError: there is no such step: its save failed, or it went.
        OSError: it is not durable in the store, or nobody can tell.
    """
    source, target = Path(job.source), parse_address(job.target)
    written = manifest.read(source)
    if written is None:
        raise FileNotFoundError(2, "there is no such checkpoint of this run", job.source)
    nonce = f"{job.tag}-upload".encode()
    with StagedObjects(target, nonce=nonce, patience_seconds=job.retry_seconds) as staged, ExitStack() as stack:
        files = _read_documents(source, written) | _cut_database(source / STATE, stack)
        files[MARKER_NAME] = (f"Checkpoint commit was successful to {target.plain}\n".encode(), nonce)
        records = manifest.record_files(files)
        sizes = staged.write(files)
        del files  # they refer to the maps
        sizes |= staged.write(
            {manifest.MANIFEST_NAME: (manifest.build(_describe(written), records, written.nonfinite),)}
        )
        staged.commit()
    return sum(sizes.values())


def _describe(written: Manifest) -> dict[str, Any]:  # JSON
    names = ("step", "run", "epoch", "batch", "metrics", "versions", "extra")
    return {name: getattr(written, name) for name in names}


def _read_documents(source: Path, written: Manifest) -> dict[str, Parts]:
    """Returns all files but the state's database, which is cut, and the marker."""
    others = [name for name in written.files if name != MARKER_NAME and not _is_of_database(name)]
    return {name: ((source / name).read_bytes(),) for name in others}


def _is_of_database(name: str) -> bool:
    return name == f"{STATE}/manifest.ocdbt" or name.startswith((f"{STATE}/d/", f"{STATE}/ocdbt.process_"))


def _cut_database(item: Path, stack: ExitStack) -> dict[str, Parts]:
    """Returns the database in data files of about `PIECE_BYTES`, which refer to maps of the old ones, and its index."""
    index = read_index(item)
    pieces = list(_choose_pieces(index))
    entries = tuple(_move(index, pieces))
    names = [name_data_file() for _ in pieces]
    values = [_map(item, piece, stack) for piece in pieces]
    database = prepare_database(
        entries, node_offset=len(values[0]), other_file_bytes=[DATA_FILE_BYTES] * (len(names) - 1)
    )
    nodes, text = database.encode(
        data_file=names[0], other_files=names[1:], uuid=os.urandom(16), commit_time_ns=time.time_ns(), crc32c=crc32c
    )
    files: dict[str, Parts] = {f"{STATE}/{name}": (value,) for name, value in zip(names, values, strict=True)}
    return files | {f"{STATE}/{names[0]}": (values[0], *nodes), f"{STATE}/manifest.ocdbt": (text,)}


def _choose_pieces(index: Index) -> Iterator[_Piece]:
    places = sorted(
        {(value.file, value.offset, value.size) for value in index.values() if isinstance(value, FileRange)}
    )
    for file, group in groupby(places, key=lambda place: place[0]):
        start = stop = -1
        for _, offset, size in group:
            if start >= 0 and offset + size - start > PIECE_BYTES:
                yield file, start, stop
                start = -1
            start, stop = offset if start < 0 else start, offset + size
        yield file, start, stop


def _move(index: Index, pieces: list[_Piece]) -> Iterator[Entry]:
    bounds = sorted((file, start, number) for number, (file, start, _) in enumerate(pieces))
    for key, value in index.items():
        if isinstance(value, bytes):
            yield key, value
            continue
        # The last piece of its file that does not begin behind it.
        _, start, number = max(bound for bound in bounds if bound[0] == value.file and bound[1] <= value.offset)
        yield key, SlotRange(value.offset - start, value.size, number)


def _map(item: Path, piece: _Piece, stack: ExitStack) -> memoryview:
    """Maps the part of a data file; `record_files` takes what begins with a map for data with checksums of its own."""
    name, start, stop = piece
    with (item / name).open("rb") as file:
        pages = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    view = stack.enter_context(memoryview(pages))
    return stack.enter_context(view[start:stop])
