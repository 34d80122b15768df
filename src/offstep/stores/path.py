"""What lies in a store, as readers want to see it: the part of `pathlib.Path` that they use.

What is there is listed once, at the first question, and not again: make a new path to see what has changed.
"""

from __future__ import annotations

import io
import os
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from offstep.stores.address import Address, is_address, parse_address
from offstep.stores.client import Store, TooShort, describe_kvstore


class _Contents:
    """The objects below one address."""

    def __init__(self, start: Address) -> None:
        self._start = start
        self.store = Store(start)

    @cached_property
    def keys(self) -> list[str]:
        """Their names, sorted; listed at the first use."""
        key = self._start.key
        found = self.store.list(key)
        return [name for name in found if not key or name == key or name.startswith(f"{key}/")]

    def below(self, prefix: str) -> Iterator[str]:
        """Yields the names that begin with a prefix."""
        for at in range(bisect_left(self.keys, prefix), len(self.keys)):
            if not self.keys[at].startswith(prefix):
                return
            yield self.keys[at]


class StorePath:
    """Something in a store, to be read; a directory is what names of objects begin with.

    Args:
        address: Where it is.
        contents: What was found there; for paths made from others.
    """

    def __init__(self, address: Address, contents: _Contents | None = None) -> None:
        self.address = address
        self._contents = contents or _Contents(address)

    def __str__(self) -> str:
        return str(self.address)

    def __repr__(self) -> str:
        return f"StorePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and self.address == other.address

    def __hash__(self) -> int:
        return hash(self.address)

    def __lt__(self, other: StorePath) -> bool:
        return self.address.key < other.address.key

    def __truediv__(self, name: str) -> StorePath:
        return StorePath(self.address / name, self._contents)

    @property
    def name(self) -> str:
        return self.address.name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> StorePath:
        return StorePath(self.address.parent, self._contents)

    def relative_to(self, other: StorePath) -> PurePosixPath:
        """Returns the names from `other` to this."""
        return PurePosixPath(self.address.key).relative_to(other.address.key or ".")

    def exists(self) -> bool:
        """Returns whether there is an object of this name, or one below it."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Returns whether there is an object of this name."""
        return self.address.key in self._contents.below(self.address.key)

    def is_dir(self) -> bool:
        """Returns whether there are objects below it."""
        return next(self._contents.below(self._prefix), None) is not None

    def iterdir(self) -> Iterator[StorePath]:
        """Yields what is directly in it, each once, in the order of the names."""
        start = len(self._prefix)
        names = (key[start:].partition("/")[0] for key in self._contents.below(self._prefix))
        return (self / name for name in dict.fromkeys(names))

    def rglob(self, pattern: str) -> Iterator[StorePath]:
        """Yields the objects below it, at any depth, whose last name fits the pattern."""
        for key in self._contents.below(self._prefix):
            if fnmatchcase(key.rpartition("/")[2], pattern):
                yield self / key[len(self._prefix) :]

    def glob(self, pattern: str) -> Iterator[StorePath]:
        """Yields the objects below it whose names fit the pattern, part by part."""
        wanted = pattern.split("/")
        for key in self._contents.below(self._prefix):
            names = key[len(self._prefix) :].split("/")
            if len(names) == len(wanted) and all(map(fnmatchcase, names, wanted)):
                yield self / "/".join(names)

    def read_bytes(self) -> bytes:
        """Returns the object.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
        """
        return self.read_range(None, None)

    def read_range(self, start: int | None, stop: int | None) -> bytes:
        """Returns a part of the object, or all of it; see `read_bytes`."""
        found = self._contents.store.get(self.address.key, start, stop)
        if found is None:
            raise FileNotFoundError(2, "there is no such object", str(self))
        return found

    def read_tail(self, size_bytes: int) -> bytes:
        """Returns the last bytes of the object, or all of it where it has not so many; see `read_bytes`."""
        try:
            return self.read_range(-size_bytes, None)
        except TooShort:
            return self.read_bytes()

    def open(self, mode: str = "rb") -> BinaryIO:
        """Opens a copy of the object for reading; see `read_bytes`."""
        assert mode == "rb", "what is written into a store goes there as a whole"
        return io.BytesIO(self.read_bytes())

    def kvstore(self) -> dict[str, Any]:  # JSON
        """Returns TensorStore's description of the directory."""
        return describe_kvstore(self.address)

    def remove_own(self, is_spared: Callable[[str], bool] = lambda _: False) -> None:
        """Deletes what has a name that objects of checkpoints have, but what is spared: the rest is somebody else's."""
        from offstep.stores.staging import is_of_checkpoint

        self.remove(lambda key: is_spared(key) or not is_of_checkpoint(key[len(self._prefix) :]))

    def remove(self, is_spared: Callable[[str], bool] = lambda _: False) -> None:
        """Deletes the checkpoint: first what tells readers that it is one; objects with keys that are spared stay."""
        from offstep.stores.staging import MARKER_NAME

        store, keys = self._contents.store, list(self._contents.below(self._prefix))
        keys = [key for key in keys if not is_spared(key)]
        if self.is_file():
            store.delete(self.address.key)
        marker = (self.address / MARKER_NAME).key
        if marker in keys:
            store.delete(marker)
        store.delete_all(key for key in keys if key != marker)

    @property
    def _prefix(self) -> str:
        return f"{self.address.key}/" if self.address.key else ""


Readable = Path | StorePath
"""Where a checkpoint is read from."""


def open_place(place: os.PathLike[str] | str | StorePath | Address) -> Readable:
    """Returns what a path or an address means, for reading.

    Raises:
        ValueError: it is an address that cannot be one.
        OSError: it cannot be asked.
    """
    if isinstance(place, (StorePath, Address)):
        return StorePath(place.address if isinstance(place, StorePath) else place)
    return StorePath(parse_address(os.fspath(place))) if is_address(place) else Path(place)


def fetch(path: StorePath) -> Path:
    """Returns a copy of an object in this machine's directory for temporary files; the caller deletes it.

    Raises:
        FileNotFoundError: there is no such object.
        OSError: it cannot be read, or there is no room for it.
    """
    content = path.read_bytes()
    descriptor, name = tempfile.mkstemp(prefix="offstep-", suffix=path.name)
    with open(descriptor, "wb") as file:
        file.write(content)
    return Path(name)


@contextmanager
def local_copy(directory: Readable) -> Iterator[Path]:
    """Gives a directory (or a file) as one of this machine: itself, or a copy that is deleted when the block ends."""
    if isinstance(directory, Path):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="offstep-") as scratch:
        copy = Path(scratch, directory.name)
        for source in [directory] if directory.is_file() else directory.rglob("*"):
            target = copy / source.relative_to(directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
        yield copy
