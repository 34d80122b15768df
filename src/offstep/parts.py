"""The contents of one file, in parts: written around the page cache where the memory and the file system allow it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence

import numpy as np

from offstep import disk

Parts = Sequence[bytes | memoryview]
"""Contents of one file, to be concatenated."""

DIRECT_FROM_BYTES = 1 << 20
"""Smaller files are not worth the trouble."""

_BLOCK_BYTES = 8 << 20
_ALIGNMENT = 4096
_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def create(name: str, mode: int, directory: int, *, direct: bool) -> int:
    """Creates a new file in an open directory, never through a link, and returns its descriptor.

    Args:
        name: Of the file.
        mode: Its permissions, before the umask.
        directory: Descriptor.
        direct: Bypass the page cache where the file system can.
    """
    flag = getattr(os, "O_DIRECT", 0) if direct else 0
    try:
        return disk.calls.create(name, _CREATE_FLAGS | flag, mode, directory)
    except OSError as error:
        if not flag or error.errno != errno.EINVAL:
            raise
    # O_DIRECT refused: the first open made the file.
    return disk.calls.create(name, _CREATE_FLAGS & ~os.O_EXCL, mode, directory)


def is_large(parts: Parts) -> bool:
    """Returns whether enough of the first parts can be written with O_DIRECT, which wants page-aligned memory."""
    return sum(len(part) for part in _take_pages(parts)) >= DIRECT_FROM_BYTES


def write_parts(descriptor: int, parts: Parts, io_threads: int) -> int:
    """Writes the parts one after another into an empty file and returns its size."""
    size = sum(len(part) for part in parts)
    if not is_large(parts):
        disk.calls.write(descriptor, b"".join(parts), 0, _BLOCK_BYTES, 1)
        return size
    try:
        _write_large(descriptor, parts, io_threads)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # A file system with larger blocks than ours, or a short write: through the page cache then.
        fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)
        _write_large(descriptor, parts, io_threads)
    return size


def write_piece(descriptor: int, content: bytes | memoryview, offset: int, io_threads: int) -> None:
    """Writes `content` at `offset`, a multiple of 4096; it may be followed by zeros up to the next page."""
    try:
        _write_piece(descriptor, content, offset, io_threads)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)  # O_DIRECT refused: through the page cache then
        _write_piece(descriptor, content, offset, io_threads)


def _take_pages(parts: Parts) -> list[memoryview]:
    """Returns the first parts that are whole pages of memory maps."""
    pages = []
    for part in parts:
        if not isinstance(part, memoryview) or not _is_whole_pages(part):
            break
        pages.append(part)
    return pages


def _is_whole_pages(view: memoryview) -> bool:
    if not isinstance(view.obj, mmap.mmap) or view.nbytes % _ALIGNMENT or not view.nbytes:
        return False
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address % _ALIGNMENT == 0


def _write_large(descriptor: int, parts: Parts, io_threads: int) -> None:
    pages = _take_pages(parts)
    offset = 0
    for part in pages:
        disk.calls.write(descriptor, part, offset, _BLOCK_BYTES, io_threads)
        offset += len(part)
    tail = b"".join(parts[len(pages) :])
    if tail:
        # In whole pages, then the padding is cut off.
        _write_padded(descriptor, tail, offset)
        disk.calls.truncate(descriptor, offset + len(tail))


def _write_piece(descriptor: int, content: bytes | memoryview, offset: int, io_threads: int) -> None:
    if isinstance(content, memoryview) and _is_whole_pages(content):
        disk.calls.write(descriptor, content, offset, _BLOCK_BYTES, io_threads)
    elif content:
        _write_padded(descriptor, content, offset)


def _write_padded(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    padded_bytes = -(-len(content) // _ALIGNMENT) * _ALIGNMENT
    with mmap.mmap(-1, padded_bytes) as page_aligned:
        page_aligned[: len(content)] = content
        disk.calls.write(descriptor, page_aligned, offset, _BLOCK_BYTES, 1)
