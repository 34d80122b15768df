"""A `.weights.h5` file as stock Keras reads it: constant metadata, then the slot, which is the arrays.

    file = metadata  slot  trailer  the slot starts on a multiple of 4096 and ends with the last page that has a dataset
    slot = (element*  crc)*         each dataset whole and in row-major order, then a CRC-32C that HDF5 does not look at

The snapshot may hold more leaves than the file: those without a path lie behind all others and are cut off.
On request HDF5's own checksums take the place of the CRCs, see `hdf5_checked`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

from offstep import commit
from offstep._native import crc32c
from offstep.finiteness import counted_beside, float_table
from offstep.formats.file_manifest import WEIGHTS_NAME, encode_trailer
from offstep.formats.file_staging import stage_file
from offstep.formats.hdf5_checked import CheckedSkeleton, make_checked_skeleton
from offstep.formats.hdf5_checksums import ArrayChecksums
from offstep.formats.hdf5_skeleton import Dataset, make_skeleton
from offstep.manifest import FileRecord
from offstep.plans import make_whole_plan
from offstep.records import Job, Leaf, PathKey, Plan
from offstep.stores.staging import StagedObject

Checksum = Callable[[memoryview, int], int]
Staged = commit.StagedFile | StagedObject

PAGE_BYTES = 4096
_IO_THREADS = 2
_FIRST_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class PreparedFile:
    """What is the same in every file of one plan.

    Attributes:
        head: Bytes before the slot.
        crc: CRC-32C of `head`.
        body_bytes: How much of the slot belongs to the file.
        float_table: Where values may be NaN or infinite, for `finiteness`.
        checked: What HDF5's own checksums are put into; `None` for a file without.
    """

    head: bytes
    crc: int
    body_bytes: int
    float_table: bytes
    checked: CheckedSkeleton | None = None


def place(leaves: Sequence[Leaf], empty_nodes: Sequence[tuple[tuple[PathKey, ...], str]]) -> Plan:
    """Gives each leaf its place in a slot: whole, and those without a path on pages of their own behind the others."""
    return make_whole_plan(leaves, empty_nodes)


def prepare(plan: Plan, documents: dict[str, Any] | None) -> PreparedFile:  # JSON
    """Makes the file's metadata; `documents` is `{"groups": {path: {attribute: text}}, "hdf5_checksums": bool}`."""
    groups = (documents or {}).get("groups", {})
    datasets, body_bytes = list_datasets(plan)
    checked = make_checked_skeleton(datasets, groups) if (documents or {}).get("hdf5_checksums") else None
    skeleton = checked or make_skeleton(datasets, groups)
    data_at = round_to_pages(len(skeleton.image))
    head = skeleton.encode(data_at=data_at, data_bytes=body_bytes)
    return PreparedFile(head, crc32c(head), body_bytes, float_table(plan), checked)


def write(job: Job, prepared: PreparedFile, slot: mmap.mmap) -> int:
    """Writes one snapshot and commits it in place of an older file; returns its size in bytes.

    Raises:
        OSError: it is not durable; an older file is untouched.
    """
    file_bytes = len(prepared.head) + prepared.body_bytes
    with stage_file(job, file_bytes) as staged, memoryview(slot) as view:
        body = view[: prepared.body_bytes]
        with counted_beside(view, prepared.float_table) as nonfinite:
            crc = (_write_plain if prepared.checked is None else _write_checked)(staged, prepared, body)
            trailer = encode_trailer(job, {WEIGHTS_NAME: FileRecord(file_bytes, crc)}, nonfinite())
        staged.write(trailer, file_bytes)
        staged.commit(file_bytes + len(trailer))
    return file_bytes + len(trailer)


def _write_plain(staged: Staged, prepared: PreparedFile, body: memoryview) -> int:
    """Writes the HDF5 file and returns its CRC-32C."""
    with computed_beside(crc32c, body, prepared.crc) as crc:
        staged.write(prepared.head, 0)
        staged.write(body, len(prepared.head), io_threads=_IO_THREADS)
        return crc()


def _write_checked(staged: Staged, prepared: PreparedFile, body: memoryview) -> int:
    """Does the same with HDF5's checksums, which have to be in the slot before it is written."""
    assert prepared.checked is not None
    head = prepared.checked.put_scalars(prepared.head, body)
    staged.write(head, 0)
    checksums, at = ArrayChecksums(body, prepared.checked.list_arrays()), len(head)
    pieces = list(_cut(body))
    crc = checksums.extend(pieces[0], crc32c(head)) if pieces else crc32c(head)
    for piece, following in zip_longest(pieces, pieces[1:], fillvalue=body[:0]):
        with computed_beside(checksums.extend, following, crc) as extended:
            staged.write(piece, at, io_threads=_IO_THREADS)
            crc = extended()
        at += len(piece)
    return crc


def _cut(body: memoryview) -> Iterator[memoryview]:
    """Cuts into pieces, each twice as large as the one before: its checksums are done before that is written."""
    at, size = 0, _FIRST_PIECE_BYTES
    while at < len(body):
        yield body[at : at + size]
        at, size = at + size, 2 * size


@contextmanager
def computed_beside(checksum: Checksum, body: memoryview, crc: int) -> Iterator[Callable[[], int]]:
    """Continues a checksum from `crc` over `body`, in a thread while the block runs; the answer waits for it."""
    with ThreadPoolExecutor(1, "offstep-checksum") as pool:
        try:
            answer = pool.submit(checksum, body, crc).result
        except RuntimeError:  # a thread that writes while the interpreter ends can start no others
            answer = partial(checksum, body, crc)
        yield answer


def list_datasets(plan: Plan) -> tuple[list[Dataset], int]:
    """Returns what the leaves that have paths are in a file, and how many bytes of the slot these leaves take."""
    layouts = [layout for layout in plan.leaves if layout.leaf.path]
    datasets = [
        Dataset("/".join(map(str, layout.leaf.path)), layout.leaf.shape, layout.leaf.dtype, layout.offset)
        for layout in layouts
    ]
    return datasets, round_to_pages(max((layout.end for layout in layouts), default=0))


def round_to_pages(size_bytes: int) -> int:
    """Returns the next multiple of a page."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
