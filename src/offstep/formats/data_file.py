"""A data file opened for reading at any place: in a file system, or an object in a store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from offstep.stores.client import TooShort
from offstep.stores.path import Readable, StorePath


class DataFile(Protocol):
    """An open data file. Any thread may read."""

    def find_fault(self, end: int) -> str:
        """Says what is wrong where the file has not got `end` bytes; else nothing."""

    def read_into(self, target: memoryview, offset: int) -> bool:
        """Fills `target` from `offset` on; returns whether the file has so many bytes."""

    def close(self) -> None: ...


class LocalFile:
    """A file of a file system.

    Raises:
        FileNotFoundError: there is none.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def find_fault(self, end: int) -> str:
        size = os.fstat(self._descriptor).st_size
        return "" if size >= end else f"it has {size} bytes, expected at least {end}"

    def read_into(self, target: memoryview, offset: int) -> bool:
        while target.nbytes:
            count = os.preadv(self._descriptor, [target], offset)
            if count == 0:
                return False
            target, offset = target[count:], offset + count
        return True

    def close(self) -> None:
        os.close(self._descriptor)


class ObjectFile:
    """An object in a store.

    Raises:
        FileNotFoundError: there is none.
    """

    def __init__(self, path: StorePath) -> None:
        if not path.is_file():
            raise FileNotFoundError(2, "there is no such object", str(path))
        self._path = path

    def find_fault(self, end: int) -> str:
        return ""  # objects are whole or not there, and there may be thousands to be asked for

    def read_into(self, target: memoryview, offset: int) -> bool:
        try:
            target[:] = self._path.read_range(offset, offset + target.nbytes)
        except TooShort:
            return False
        return True

    def close(self) -> None:
        pass


def open_data_file(path: Readable) -> DataFile:
    """Opens a data file.

    Raises:
        FileNotFoundError: there is none.
    """
    return ObjectFile(path) if isinstance(path, StorePath) else LocalFile(path)
