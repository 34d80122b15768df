"""One step of an Orbax root in an object store: the slot in pieces that can be sent again, then its commit marker."""

from __future__ import annotations

import mmap
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np

from offstep import manifest
from offstep.finiteness import counted_beside
from offstep.formats.base_file import Run, Split
from offstep.formats.ocdbt import OWN_FILE, SlotRange
from offstep.formats.orbax_directory import (
    ArrayItem,
    Parts,
    PreparedDirectory,
    database_files,
    document_files,
    name_data_file,
    spread,
)
from offstep.records import Job
from offstep.stores.address import Address
from offstep.stores.staging import MARKER_NAME, StagedObjects

PIECE_BYTES = 16 << 20
"""Size of a data object, unless one chunk is larger: what is in flight is in memory three times."""

_STATE = "pytree"


def write(
    job: Job,
    target: Address,
    prepared: PreparedDirectory,
    slot: mmap.mmap,
    attachments: Mapping[str, mmap.mmap],
) -> int:
    """Writes one snapshot into a store and commits it; returns the bytes of all objects.

    Raises:
        OSError: it is not durable, or nobody can tell; what was there before is touched only if it has the same step.
    """
    nonce = job.tag.encode()
    with (
        StagedObjects(target, nonce=nonce, patience_seconds=job.retry_seconds) as staged,
        memoryview(slot) as view,
    ):
        with counted_beside(view, prepared.float_table) as nonfinite:
            files = data_objects(
                prepared, view, step=job.step, target=str(target.plain), now_ns=time.time_ns(), nonce=nonce
            )
            records = manifest.record_files(files)
            sizes = staged.write(files)
            del files  # they refer to the slot
        for name, buffer in attachments.items():
            with memoryview(buffer) as content:
                files = {name: (bytes(content),)}
            records |= manifest.record_files(files)
            sizes |= staged.write(files)
        text = manifest.build(job.manifest, records, nonfinite())
        sizes |= staged.write({manifest.MANIFEST_NAME: (text,)})
        staged.commit()
    return sum(sizes.values())


def data_objects(
    prepared: PreparedDirectory,
    slot: memoryview,
    *,
    step: int,
    target: str,
    now_ns: int,
    nonce: bytes,
    piece_bytes: int = PIECE_BYTES,
) -> dict[str, Parts]:
    """Returns what `orbax_directory.data_files` does, with the slot in pieces; the commit marker ends with `nonce`."""
    split = cut_slot(prepared.state, piece_bytes)
    others = [name_data_file() for _ in range(split.runs[-1].file)]
    files = document_files(prepared, step=step, target=target, now_ns=now_ns)
    files[MARKER_NAME] = (*files[MARKER_NAME], b"\n", nonce)
    files |= {f"{_STATE}/{name}": split.pieces(slot, number) for number, name in enumerate(others, OWN_FILE + 1)}
    return files | database_files(spread(prepared, split), split.pieces(slot, OWN_FILE), now_ns, others)


def cut_slot(item: ArrayItem, piece_bytes: int) -> Split:
    """Returns the slot as data files of about `piece_bytes` each; no chunk lies in two of them."""
    starts = sorted({value.offset for _, value in item.entries if isinstance(value, SlotRange)})
    bounds = [0, *_choose_cuts(starts, item.image_bytes, piece_bytes), item.image_bytes]
    runs = tuple(Run(start, stop - start, number, 0) for number, (start, stop) in enumerate(pairwise(bounds)))
    nothing = np.empty(0, np.uint32)  # there is no base
    return Split(runs, None, False, 0, nothing, nothing)


def _choose_cuts(starts: list[int], end: int, piece_bytes: int) -> Iterator[int]:
    at = 0
    while end - at > piece_bytes:
        number = bisect_right(starts, at + piece_bytes) - 1
        if number < 0 or starts[number] <= at:  # one chunk is larger
            number = bisect_right(starts, at)
            if number == len(starts):
                return
        at = starts[number]
        yield at
