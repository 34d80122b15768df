"""A file that the trainer has made itself: the slot holds its bytes. Only the manifest comes behind them."""

from __future__ import annotations

import mmap
import struct
from typing import Any

from offstep._native import crc32c
from offstep.formats.file_manifest import WEIGHTS_NAME, encode_comment, encode_trailer
from offstep.formats.file_staging import stage_file
from offstep.formats.keras_weights import PAGE_BYTES, computed_beside
from offstep.manifest import FileRecord
from offstep.records import Job, Plan

_IO_THREADS = 2
_HDF5_MARK = b"\x89HDF\r\n\x1a\n"
# APPNOTE.TXT 4.3.16: what ends an archive that has no comment yet; its last field is the length of the comment.
_ZIP_END_MARK, _ZIP_END_BYTES = b"PK\x05\x06", 22
_COMMENT_LENGTH = struct.Struct("<H")


def prepare(plan: Plan, documents: dict[str, Any] | None) -> None:
    """Does nothing: there is no part that all files have in common."""


def write(job: Job, prepared: None, slot: mmap.mmap) -> int:
    """Writes the file and commits it in place of an older one; returns its size in bytes.

    Raises:
        OSError: it is not durable; an older file is untouched.
    """
    assert job.file_bytes is not None
    with stage_file(job, job.file_bytes) as staged, memoryview(slot) as view:
        # In whole pages as long as nothing is to be changed, which is the end at most.
        pages_bytes = max(0, job.file_bytes - _ZIP_END_BYTES) // PAGE_BYTES * PAGE_BYTES
        is_hdf5 = view[: len(_HDF5_MARK)] == _HDF5_MARK
        with computed_beside(crc32c, view[: job.file_bytes if is_hdf5 else 0], 0) as crc:
            staged.write(view[:pages_bytes], 0, io_threads=_IO_THREADS)
            end = bytes(view[pages_bytes : job.file_bytes])
            end = _end_hdf5(end, job, crc()) if is_hdf5 else _end_archive(end, job)
        staged.write(end, pages_bytes)
        size_bytes = pages_bytes + len(end)
        staged.commit(size_bytes)
    return size_bytes


def _end_hdf5(end: bytes, job: Job, crc: int) -> bytes:
    assert job.file_bytes is not None
    return end + encode_trailer(job, {WEIGHTS_NAME: FileRecord(job.file_bytes, crc)}, None)


def _end_archive(end: bytes, job: Job) -> bytes:
    """Gives an archive its comment, unless it ends in another way than those of stock Keras."""
    record = end[-_ZIP_END_BYTES:]
    if not record.startswith(_ZIP_END_MARK) or record[-_COMMENT_LENGTH.size :] != _COMMENT_LENGTH.pack(0):
        return end
    comment = encode_comment(job, {}, None)
    return end[: -_COMMENT_LENGTH.size] + _COMMENT_LENGTH.pack(len(comment)) + comment
