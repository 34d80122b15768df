"""The system calls that change the disk, in one table, so that a test can put a failure in the place of any of them.

Only `commit` uses it. Names are relative to the descriptor of a directory, so that no link on the way can lead
elsewhere.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap

from offstep import _native


def _create(name: str, flags: int, mode: int, directory: int) -> int:
    return os.open(name, flags, mode, dir_fd=directory)


def _make_directory(name: str, mode: int, directory: int) -> None:
    os.mkdir(name, mode, dir_fd=directory)


def _link(path: str, name: str, directory: int) -> None:
    os.link(path, name, dst_dir_fd=directory, follow_symlinks=False)


def _rename(old: str, new: str, directory: int) -> None:
    os.rename(old, new, src_dir_fd=directory, dst_dir_fd=directory)


def _adopt(path: str, name: str, directory: int) -> None:
    os.rename(path, name, dst_dir_fd=directory)


def _exchange(first: str, second: str, directory: int) -> None:
    _native.rename_exchange(first, second, directory)


def _fsync_parent(descriptor: int) -> None:
    os.fsync(descriptor)
    # XFS that has shut down after an error lets the fsync of a directory succeed, but not a look at it.
    os.fstat(descriptor)


def _delete(name: str, directory: int) -> None:
    """Deletes a tree, a file or a link but not what it links to; that there is none is no error."""
    try:
        mode = os.lstat(name, dir_fd=directory).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        shutil.rmtree(name, dir_fd=directory)
    else:
        os.unlink(name, dir_fd=directory)


@dataclass(frozen=True)
class Calls:
    """Every call by which a checkpoint is made durable; the field names are the points at which it can fail.

    Attributes:
        make_directory: (name, mode, directory descriptor).
        create: Opens a new file: (name, flags, mode, directory descriptor) → descriptor.
        write: (descriptor, data, offset, bytes in a block, threads).
        truncate: (descriptor, size).
        link: Gives a file one more name: (path of the file, new name, directory descriptor of the new name).
        fsync_file: (descriptor).
        fsync_directory: A directory inside the checkpoint: (descriptor).
        fsync_parent: The directory that holds the final name: (descriptor).
        rename: (old name, new name, directory descriptor of both); a file of the new name is replaced.
        adopt: Moves a directory in from elsewhere in the file system: (its path, new name, directory descriptor).
        exchange: Swaps two names in one step: (first, second, directory descriptor of both).
        delete: A tree, file or link, if it is there: (name, directory descriptor).
    """

    make_directory: Callable[[str, int, int], None] = _make_directory
    create: Callable[[str, int, int, int], int] = _create
    write: Callable[[int, bytes | memoryview | mmap, int, int, int], None] = _native.write_at
    truncate: Callable[[int, int], None] = os.ftruncate
    link: Callable[[str, str, int], None] = _link
    fsync_file: Callable[[int], None] = os.fsync
    fsync_directory: Callable[[int], None] = os.fsync
    fsync_parent: Callable[[int], None] = _fsync_parent
    rename: Callable[[str, str, int], None] = _rename
    adopt: Callable[[str, str, int], None] = _adopt
    exchange: Callable[[str, str, int], None] = _exchange
    delete: Callable[[str, int], None] = _delete


calls = Calls()
"""What is called. The entry point of a test's writer process puts another table here before it serves."""
