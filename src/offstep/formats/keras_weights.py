"""A `.weights.h5` file as stock Keras reads it: constant metadata, then the slot, which is the arrays.

    file = metadata  slot  trailer  the slot starts on a multiple of 4096 and ends with the last page that has a dataset
    slot = (element*  crc)*         each dataset whole and in row-major order, then a CRC-32C that HDF5 does not look at

The snapshot may hold more leaves than the file: those without a path lie behind all others and are cut off.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from offstep._native import crc32c
from offstep.finiteness import counted_beside, float_table
from offstep.formats.file_manifest import WEIGHTS_NAME, encode_trailer
from offstep.formats.file_staging import stage_file
from offstep.formats.hdf5_skeleton import Dataset, Skeleton, make_skeleton
from offstep.manifest import FileRecord
from offstep.plans import make_whole_plan
from offstep.records import Job, Leaf, PathKey, Plan

Checksum = Callable[[memoryview, int], int]

PAGE_BYTES = 4096
_IO_THREADS = 2


@dataclass(frozen=True)
class PreparedFile:
    """What is the same in every file of one plan.

    Attributes:
        head: Bytes before the slot.
        crc: CRC-32C of `head`.
        body_bytes: How much of the slot belongs to the file.
        float_table: Where values may be NaN or infinite, for `finiteness`.
    """

    head: bytes
    crc: int
    body_bytes: int
    float_table: bytes


def place(leaves: Sequence[Leaf], empty_nodes: Sequence[tuple[tuple[PathKey, ...], str]]) -> Plan:
    """Gives each leaf its place in a slot: whole, and those without a path on pages of their own behind the others."""
    return make_whole_plan(leaves, empty_nodes)


def prepare(plan: Plan, documents: dict[str, Any] | None) -> PreparedFile:  # JSON
    """Makes the file's metadata; `documents` is `{"groups": {path: {attribute: text}}}`."""
    skeleton, body_bytes = make_plan_skeleton(plan, (documents or {}).get("groups", {}))
    data_at = round_to_pages(len(skeleton.image))
    head = skeleton.encode(data_at=data_at, data_bytes=body_bytes)
    return PreparedFile(head, crc32c(head), body_bytes, float_table(plan))


def write(job: Job, prepared: PreparedFile, slot: mmap.mmap) -> int:
    """Writes one snapshot and commits it in place of an older file; returns its size in bytes.

    Raises:
        OSError: it is not durable; an older file is untouched.
    """
    head = prepared.head
    file_bytes = len(head) + prepared.body_bytes
    with stage_file(job, file_bytes) as staged, memoryview(slot) as view:
        body = view[: prepared.body_bytes]
        with (
            counted_beside(view, prepared.float_table) as nonfinite,
            computed_beside(crc32c, body, prepared.crc) as crc,
        ):
            staged.write(head, 0)
            staged.write(body, len(head), io_threads=_IO_THREADS)
            trailer = encode_trailer(job, {WEIGHTS_NAME: FileRecord(file_bytes, crc())}, nonfinite())
        staged.write(trailer, file_bytes)
        staged.commit(file_bytes + len(trailer))
    return file_bytes + len(trailer)


@contextmanager
def computed_beside(checksum: Checksum, body: memoryview, crc: int) -> Iterator[Callable[[], int]]:
    """Continues a checksum from `crc` over `body`, in a thread while the block runs; the answer waits for it."""
    with ThreadPoolExecutor(1, "offstep-checksum") as pool:
        try:
            answer = pool.submit(checksum, body, crc).result
        except RuntimeError:  # a thread that writes while the interpreter ends can start no others
            answer = partial(checksum, body, crc)
        yield answer


def make_plan_skeleton(plan: Plan, groups: dict[str, dict[str, str]]) -> tuple[Skeleton, int]:
    """Returns the metadata for the leaves that have paths, and how many bytes of the slot these leaves take."""
    datasets = [
        Dataset("/".join(map(str, layout.leaf.path)), layout.leaf.shape, layout.leaf.dtype, layout.offset)
        for layout in plan.leaves
        if layout.leaf.path
    ]
    ends = [layout.offset + layout.chunk_count * layout.stride_bytes for layout in plan.leaves if layout.leaf.path]
    return make_skeleton(datasets, groups), round_to_pages(max(ends, default=0))


def round_to_pages(size_bytes: int) -> int:
    """Returns the next multiple of a page."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
