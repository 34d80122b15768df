"""What one training process writes of an Orbax step in an object store: its slot, in pieces that nobody refers to yet.

They lie where they will stay. Their names tell the save that they belong to, so that whoever cleans up spares those of
saves that are on their way; which chunk lies in which of them follows from their sizes. What this process attaches to
the step are the last pieces: under its own name it comes with the commit, because a writer that has outlived its run
may still put it there.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from offstep import manifest
from offstep.finiteness import counted_beside
from offstep.formats.ocdbt import OWN_FILE
from offstep.formats.orbax_directory import STATE, ArrayItem
from offstep.formats.orbax_objects import PIECE_BYTES, cut_slot
from offstep.records import Job, Share
from offstep.stores import staging
from offstep.stores.address import Address, parse_address
from offstep.stores.staging import Parts

ITEM_PREFIX = "ocdbt.process_"
"""What the names of databases begin with."""

_RUN_DIGITS, _ENGINE_DIGITS, _DIGITS = 10, 6, 8  # of a name: run, engine, how often it was saved, number
_NAME_DIGITS = _RUN_DIGITS + _ENGINE_DIGITS + 2 * _DIGITS


@dataclass(frozen=True)
class PreparedShare:
    """What is the same in each share of one plan.

    Attributes:
        process: Which one writes it.
        commits: Whether it is the one that commits.
        item: The database; `None` where the process has nothing to write.
        own_floats: Where the floating leaves lie that no other process writes.
    """

    process: int
    commits: bool
    item: ArrayItem | None
    own_floats: bytes


def item_name(process: int) -> str:
    """Returns the name of a process's database."""
    return f"{ITEM_PREFIX}{process}"


def name_pieces(key: str, process: int, count: int) -> list[str]:
    """Returns the names of a share's objects, relative to the item.

    Args:
        key: Of the save: `<any>/<run>/<number of the engine>/<step>/<how often it was saved>`.
        process: Whose they are.
        count: How many there are.
    """
    first = f"{item_name(process)}/d/{_name_save(key)}"
    return [f"{first}{number:0{_DIGITS}x}" for number in range(count)]


def is_of_save(name: str, key: str) -> bool:
    """Returns whether an object in a step's directory is a piece of the save with this key."""
    return _is_piece(name) and _last(name).startswith(_name_save(key))


def is_of_run(name: str, key: str) -> bool:
    """Returns whether an object in any step's directory is a piece of the same run's."""
    return _is_piece(name) and _last(name).startswith(_name_save(key)[:_RUN_DIGITS])


def may_be_on_its_way(name: str, key: str) -> bool:
    """Returns whether an object in a step's directory may be a piece of another save of this step: one of another
    engine of this run, or a later one of the same.
    """
    own, other = _name_save(key), _last(name)[:-_DIGITS]
    is_same = own[:-_DIGITS] == other[:-_DIGITS]
    return is_of_run(name, key) and (other > own if is_same else True)


def write(
    job: Job, target: Address, prepared: PreparedShare, slot: mmap.mmap, attachments: Mapping[str, mmap.mmap]
) -> Share:
    """Puts one snapshot's share into the store, in pieces; see `orbax_share.write`.

    Raises:
        OSError: it is not there as a whole; what is there has been deleted, as far as the store lets that happen.
    """
    with memoryview(slot) as view:
        with counted_beside(view, prepared.own_floats) as nonfinite:
            attached = {name: (buffer[:],) for name, buffer in attachments.items()}
            pieces: list[Parts] = [(piece,) for piece in _cut(prepared, view)]
            sizes = put_pieces(job, target, prepared, [*pieces, *attached.values()])
            own = len(pieces)
            del pieces  # they refer to the slot
        records = manifest.record_files(attached)
        files = {name: (record.size, record.crc32c) for name, record in records.items()}
        note = {"pieces": sizes[:own], "files": files, "nonfinite": nonfinite()}
    return Share(sum(sizes), note)


def put_pieces(job: Job, target: Address, prepared: PreparedShare, pieces: Sequence[Parts]) -> list[int]:
    """Puts the pieces of a share into the store, and returns their sizes; see `write`."""
    names = name_pieces(job.key, prepared.process, len(pieces))
    files = {f"{STATE}/{name}": parts for name, parts in zip(names, pieces, strict=True)}
    staging.put_data(target, files, job.retry_seconds, job.until)
    return [sum(map(len, parts)) for parts in pieces]


def discard(job: Job, prepared: PreparedShare, slot: mmap.mmap, attachments: Mapping[str, mmap.mmap]) -> int:
    """Deletes what the save with the key of the job has left: this process's share, or all if it would have committed.

    Raises:
        OSError: something may be left.
    """
    folder = STATE if prepared.commits else f"{STATE}/{item_name(prepared.process)}"
    is_left = partial(is_of_save, key=job.key)
    staging.remove_data(parse_address(job.target) / folder, is_left, job.retry_seconds)
    return 0


def _cut(prepared: PreparedShare, slot: memoryview) -> Iterator[memoryview]:
    if prepared.item is not None:
        split = cut_slot(prepared.item, PIECE_BYTES)
        for number in range(OWN_FILE, split.runs[-1].file + 1):
            yield from split.pieces(slot, number)


def _name_save(key: str) -> str:
    run, engine, _, repeat = key.rsplit("/", 3)
    digest = hashlib.blake2b(run.encode(), digest_size=_RUN_DIGITS // 2).hexdigest()
    return f"{digest}{int(engine):0{_ENGINE_DIGITS}x}{int(repeat):0{_DIGITS}x}"


def _is_piece(name: str) -> bool:
    return re.search(rf"(?:^|/)ocdbt\.process_\d+/d/[0-9a-f]{{{_NAME_DIGITS}}}$", name) is not None


def _last(name: str) -> str:
    return name.rpartition("/")[2]
