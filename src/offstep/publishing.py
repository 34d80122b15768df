"""A file made piece by piece on the disk, then put in its place as a whole: it may be larger than the memory."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from offstep import commit

_IO_THREADS = 2


@contextmanager
def open_scratch(directory: Path) -> Iterator[IO[bytes]]:
    """Opens a nameless file in a directory; it is gone when the block ends, or this process."""
    with tempfile.TemporaryFile(dir=directory) as file:
        yield file


def publish(file: IO[bytes], target: Path) -> int:
    """Makes a copy of a file durable at `target`, in place of an older one; returns its size in bytes.

    Raises:
        OSError: it is not durable; an older file is untouched.
    """
    file.flush()
    size_bytes = os.fstat(file.fileno()).st_size
    with (
        map_pages(file, size_bytes) as pages,
        memoryview(pages) as view,
        commit.StagedFile(target, size_bytes=size_bytes) as staged,
    ):
        staged.write(view, 0, io_threads=_IO_THREADS)
        staged.commit()
    return size_bytes


def map_pages(file: IO[bytes], size_bytes: int) -> mmap.mmap:
    """Maps a file, and makes it as long as whole pages first."""
    whole = max(1, -(-size_bytes // mmap.PAGESIZE)) * mmap.PAGESIZE
    os.ftruncate(file.fileno(), whole)
    return mmap.mmap(file.fileno(), whole)
