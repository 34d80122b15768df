"""Copies what one of several training processes writes of a step from a disk of its own into a store.

On its disk it has all that it holds; in the store each has its share, as if they had saved there together.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from offstep import manifest
from offstep._native import crc32c
from offstep.errors import CheckpointDamaged
from offstep.finiteness import count_nonfinite
from offstep.formats.ocdbt import SlotRange
from offstep.formats.ocdbt_index import FileRange, read_index
from offstep.formats.orbax_directory import STATE, ArrayItem
from offstep.formats.orbax_objects import PIECE_BYTES, cut_slot
from offstep.formats.orbax_share_objects import PreparedShare, put_pieces
from offstep.manifest import FileRecord, Manifest
from offstep.records import Job, Share
from offstep.stores.address import parse_address
from offstep.stores.staging import Parts

_ATTACHED_PREFIX = "offstep-"


class _Chunk(NamedTuple):
    """Where a chunk lies in a slot that had the share alone, and in the data file of the step on the disk."""

    slot_offset: int
    file_offset: int
    size: int


def write(job: Job, prepared: PreparedShare, slot: mmap.mmap, attachments: Mapping[str, mmap.mmap]) -> Share:
    """Puts this process's share of the step `job.source` into the store; see `orbax_share.write`.

    Raises:
        FileNotFoundError: that step is there no more, or another save of it.
        CheckpointDamaged: it is not what was saved.
        OSError: the share is not in the store as a whole; what is there has been deleted, as far as that can be.
    """
    source = Path(job.source)
    attached = _read_attached(source, _read_manifest(source, job), prepared.process)
    pieces: list[Parts] = []
    nonfinite = 0
    if prepared.item is not None:
        file, chunks = _find_chunks(source / STATE, prepared.item)
        view = _map(source / STATE / file)
        _read_manifest(source, job)  # once more: from here on it stays what it was, even if it is saved again
        nonfinite = _count(view, prepared, chunks)
        pieces += _cut(prepared.item, chunks, view)
    sizes = put_pieces(job, parse_address(job.target), prepared, [*pieces, *attached.values()])
    records = manifest.record_files(attached)
    files = {name: (record.size, record.crc32c) for name, record in records.items()}
    return Share(sum(sizes), {"pieces": sizes[: len(pieces)], "files": files, "nonfinite": nonfinite})


def _map(path: Path) -> memoryview:
    """Maps a file; it is unmapped with its last view, of which the traceback of an error may have some."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _read_manifest(source: Path, job: Job) -> Manifest:
    """A step that has been saved again meanwhile may be another one than the other processes copy."""
    written = manifest.read(source)
    if written is None or (written.run, written.number) != (job.manifest["run"], job.manifest["number"]):
        raise FileNotFoundError(2, "the step is there no more, or has been saved again", job.source)
    return written


def _read_attached(source: Path, written: Manifest, process: int) -> dict[str, Parts]:
    """Returns what lies beside the arrays, by the names that it has where all processes save together."""
    names = [name for name in written.files if name.startswith(_ATTACHED_PREFIX)]
    return {_name_attached(name, process): (_read_checked(source / name, written.files[name]),) for name in names}


def _name_attached(name: str, process: int) -> str:
    if process == 0:
        return name
    stem, dot, rest = name.partition(".")
    return f"{stem}.process_{process}{dot}{rest}"


def _read_checked(path: Path, record: FileRecord) -> bytes:
    content = path.read_bytes()
    # One that has no checksum in the manifest has its own, which whoever reads it checks.
    if len(content) != record.size or record.crc32c not in (None, crc32c(content)):
        raise CheckpointDamaged(f"{path} is not what was saved")
    return content


def _find_chunks(database: Path, item: ArrayItem) -> tuple[str, list[_Chunk]]:
    """Returns the data file, relative to the database, and the chunks of the share, in the order of the slot."""
    index = read_index(database)
    files: set[str] = set()
    chunks: list[_Chunk] = []
    for key, place in item.entries:
        if not isinstance(place, SlotRange):
            continue
        found = index.get(key)
        if not isinstance(found, FileRange) or found.size != place.size:
            raise CheckpointDamaged(f"{database} has not the part {key.decode()} that this process has saved")
        files.add(found.file)
        chunks.append(_Chunk(place.offset, found.offset, found.size))
    if len(files) != 1:
        raise CheckpointDamaged(f"{database} has its arrays in {len(files)} files, and was saved with one")
    return files.pop(), sorted(chunks)


def _count(view: memoryview, prepared: PreparedShare, chunks: Sequence[_Chunk]) -> int:
    offsets = {chunk.slot_offset: chunk.file_offset for chunk in chunks}
    return count_nonfinite(view, prepared.own_floats, offsets)


def _cut(item: ArrayItem, chunks: Sequence[_Chunk], view: memoryview) -> Iterator[Parts]:
    """Yields the pieces that a slot with the share alone would be cut into."""
    for run in cut_slot(item, PIECE_BYTES).runs:
        yield list(_fill(chunks, view, run.slot_offset, run.slot_offset + run.size))


def _fill(chunks: Sequence[_Chunk], view: memoryview, start: int, stop: int) -> Iterator[bytes | memoryview]:
    """Yields the bytes of the slot from `start` to `stop`, with zeros between the chunks."""
    at = start
    for chunk in chunks[bisect_left(chunks, (start,)) : bisect_left(chunks, (stop,))]:
        yield bytes(chunk.slot_offset - at)
        yield view[chunk.file_offset : chunk.file_offset + chunk.size]
        at = chunk.slot_offset + chunk.size
    yield bytes(stop - at)
