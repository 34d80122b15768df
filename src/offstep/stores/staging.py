"""Checkpoints on their way into a store. There is no rename there: what tells a checkpoint is its last object.

The order for a directory: the data under names that no other attempt has, the documents, then `commit_success.txt`,
which stock Orbax looks for in a store. It is created only if there is none, and holds a text that no other attempt
has, so that an attempt whose acknowledgement was lost can tell its own from another's. A store acknowledges an object
when it is durable.
"""

from __future__ import annotations

import contextlib
import errno
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from offstep._native import crc32c
from offstep.stores.address import Address
from offstep.stores.client import CONCURRENCY, SMALL_CONCURRENCY, Patience, Store, Unanswered

MARKER_NAME = "commit_success.txt"

_CLEANING_SECONDS = 2.0
_SMALL_BYTES = 64 << 10

# Of what a checkpoint has: nothing else is ever deleted but together with a committed one.
_OF_DATABASE = r"(?:ocdbt\.process_\d+/)?(?:manifest\.ocdbt|d/[0-9a-f]+)"
_OF_ITEM = rf"_METADATA|_sharding|_strings\.json|commit_success\.txt|array_metadatas/process_\d+|{_OF_DATABASE}"
_OF_STEP = r"offstep\.json|offstep-[^/]+|_CHECKPOINT_METADATA|checkpoint_metadata|commit_success\.txt"
_OF_CHECKPOINT = re.compile(rf"{_OF_STEP}|(?:pytree|model_config|assets)/(?:{_OF_ITEM})")

Parts = Sequence[bytes | memoryview]
Source = tuple[str, int, int]
"""What is to be copied: relative POSIX path, size in bytes and CRC-32C."""


class StagedObjects:
    """A directory that is being written to its final place, where readers do not see it before its marker.

    Use it as a context manager: what has not been committed when the block ends is deleted, as far as the store lets
    that happen at once.

    Args:
        final: The checkpoint.
        nonce: Text that no other attempt has.
        patience_seconds: How long the store may fail before that is an error.
        is_spared: Tells of the key of an object that is there already, and nothing of this attempt's, whether it stays.

    Raises:
        OSError: the store cannot be asked.
        FileExistsError: other things than a checkpoint have its name.
    """

    def __init__(
        self,
        final: Address,
        *,
        nonce: bytes,
        patience_seconds: float,
        is_spared: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.final = final
        self.is_committed = False
        self._nonce, self._is_spared = nonce, is_spared
        self._store = Store(final, Patience(patience_seconds))
        self._marker_key = (final / MARKER_NAME).key
        self._documents: dict[str, bytes] = {}
        self._written: set[str] = set()
        self._adopted: set[str] = set()
        self._copies: dict[str, Source] = {}
        self._found = set(self._store.list(f"{final.key}/"))
        if self._marker_key in self._found and self._is_ours():
            self.is_committed = True  # by an earlier attempt, whose report was lost
        self._refuse_foreign()

    def __enter__(self) -> StagedObjects:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self.is_committed or isinstance(error, Unanswered):  # nor would it answer now; what is left is no checkpoint
            return
        with contextlib.suppress(OSError):  # the next checkpoint of this run sweeps what is left
            Store(self.final, Patience(_CLEANING_SECONDS)).delete_all(sorted(self._written - self._found))

    def write(self, files: Mapping[str, Parts]) -> dict[str, int]:
        """Puts data files into the store, keeps documents for `commit`, and returns their sizes in bytes.

        Args:
            files: Relative POSIX path → parts. A path of a data file (`.../d/<name>`) must be used by nobody else, and
                the marker must end with the nonce.

        Raises:
            OSError: the first failure.
        """
        data = {path: parts for path, parts in files.items() if _is_data(path)}
        self._documents |= {path: b"".join(parts) for path, parts in files.items() if path not in data}
        self._put({path: partial(b"".join, parts) for path, parts in data.items() if not self.is_committed})
        return {path: sum(map(len, parts)) for path, parts in files.items()}

    def adopt(self, paths: Iterable[str]) -> None:
        """Takes data files in that others have put there; they stay where this fails.

        Raises:
            FileNotFoundError: one is gone.
        """
        keys = {(self.final / path).key for path in paths}
        self._look_for(keys)
        self._adopted |= keys

    def copy(self, sources: Mapping[str, Source]) -> None:
        """Has `commit` put documents there that others have put under names of data files; these go after that.

        Args:
            sources: By the relative POSIX paths of the documents.

        Raises:
            FileNotFoundError: one is gone.
        """
        self._look_for({(self.final / path).key for path, _, _ in sources.values()})
        self._copies |= sources

    def _look_for(self, keys: set[str]) -> None:
        missing = sorted(keys - self._found)
        if missing and not self.is_committed:
            text = f"{len(missing)} of {len(keys)} data objects that were put there are gone; this is the first"
            raise FileNotFoundError(errno.ENOENT, text, self._spell(missing[0]))

    def commit(self) -> None:
        """Makes everything written a checkpoint.

        One of the same name that was there before is none from the moment at which its documents are replaced until
        the new one is. Its data, and what dead attempts left, go away after that.

        Raises:
            OSError: it is none, or nobody can tell: then the text says so.
            FileExistsError: another run has committed one of this name meanwhile.
        """
        if self.is_committed:
            return
        marker = self._documents.pop(MARKER_NAME)
        assert marker.endswith(self._nonce), "another attempt might have the same"
        if self._marker_key in self._found:
            self._store.delete(self._marker_key)
        self._put({path: partial(bytes, content) for path, content in self._documents.items()})
        self._put_copies()
        self._mark(marker)
        self.is_committed = True
        with contextlib.suppress(OSError):  # it is committed all the same, and readers do not look at what is left
            left = self._found - self._written - self._adopted - {self._marker_key}
            self._store.delete_all(sorted(key for key in left if not self._is_spared(key)))

    def _mark(self, marker: bytes) -> None:
        try:
            is_ours = self._store.create(self._marker_key, marker)
        except Unanswered as error:
            error.args = (error.errno, f"{error.strerror}; it may still appear there, and whole", error.filename)
            raise
        if not is_ours:
            text = "another run has committed a checkpoint of this name meanwhile"
            raise FileExistsError(errno.EEXIST, text, str(self.final))

    def _refuse_foreign(self) -> None:
        if self._marker_key in self._found:
            return
        start = len(self.final.key) + 1
        foreign = [key for key in sorted(self._found) if not is_of_checkpoint(key[start:]) and not key.endswith("/")]
        if foreign:
            text = "an object that is of no checkpoint has the name of this step; move it away, or save elsewhere"
            raise FileExistsError(errno.EEXIST, text, self._spell(foreign[0]))

    def _is_ours(self) -> bool:
        return (self._store.get(self._marker_key) or b"").endswith(self._nonce)

    def _put_copies(self) -> None:
        makers = {path: partial(self._read_checked, *source) for path, source in self._copies.items()}
        small = {path for path, (_, size, _) in self._copies.items() if size <= _SMALL_BYTES}
        self._put({path: make for path, make in makers.items() if path in small}, SMALL_CONCURRENCY)
        self._put({path: make for path, make in makers.items() if path not in small})

    def _read_checked(self, path: str, size: int, checksum: int) -> bytes:
        key = (self.final / path).key
        content = self._store.get(key)
        if content is None or (len(content), crc32c(content)) != (size, checksum):
            text = "it cannot be copied: it is gone, or not what was put there"
            raise OSError(errno.EIO, text, self._spell(key))
        return content

    def _put(self, files: Mapping[str, Callable[[], bytes]], concurrency: int = CONCURRENCY) -> None:
        keys = {(self.final / path).key: make for path, make in files.items()}
        self._written |= set(keys)
        self._store.put_all(keys, concurrency)

    def _spell(self, key: str) -> str:
        return f"{self.final.scheme}://{self.final.bucket}/{key}"


def is_of_checkpoint(path: str) -> bool:
    """Returns whether an object in the directory of a checkpoint has a name that one of offstep's has there."""
    return _OF_CHECKPOINT.fullmatch(path) is not None


def probe(place: Address, patience_seconds: float) -> None:
    """Checks that objects can be listed, put and deleted below an address; leaves nothing there.

    Raises:
        OSError: they cannot; the message names the address.
        Unanswered: the store has not answered for so long.
    """
    key = (place / f".offstep-probe-{secrets.token_hex(8)}").key  # nobody else's: several processes do this at once
    store = Store(place, Patience(patience_seconds))
    try:
        store.list(key)
        store.put(key, b"")
        store.delete(key)
    except OSError as error:
        kind = Unanswered if isinstance(error, Unanswered) else OSError
        raise kind(error.errno, f"checkpoints cannot be saved here: {error.strerror}", str(place)) from error


def put_data(final: Address, files: Mapping[str, Parts], patience_seconds: float, until: float | None = None) -> None:
    """Puts data files of a checkpoint there, for somebody else to commit.

    Args:
        final: The checkpoint.
        files: Relative POSIX path → parts; paths that nobody else uses.
        patience_seconds: How long the store may fail before that is an error.
        until: When to begin no more of them, by `time.monotonic()`.

    Raises:
        OSError: the first failure; what is there has been deleted, as far as the store lets that happen at once.
    """
    keys = {(final / path).key: parts for path, parts in files.items()}
    try:
        makers = {key: partial(_join_in_time, parts, until) for key, parts in keys.items()}
        Store(final, Patience(patience_seconds)).put_all(makers)
    except OSError as error:
        if not isinstance(error, Unanswered):
            with contextlib.suppress(OSError):
                Store(final, Patience(_CLEANING_SECONDS)).delete_all(sorted(keys))
        raise


def _join_in_time(parts: Parts, until: float | None) -> bytes:
    if until is not None and time.monotonic() >= until:
        raise TimeoutError(errno.ETIMEDOUT, "it was not there in time, and has been given up")
    return b"".join(parts)


def remove_data(folder: Address, is_left: Callable[[str], bool], patience_seconds: float) -> None:
    """Deletes the objects in a folder that `is_left` is true of, given their keys.

    Raises:
        OSError: the store has not deleted all of them.
    """
    store = Store(folder, Patience(patience_seconds))
    store.delete_all(key for key in store.list(f"{folder.key}/") if is_left(key))


def holds_marker(final: Address, nonce: bytes, patience_seconds: float) -> bool:
    """Returns whether a checkpoint has been committed by the attempt with this nonce.

    Raises:
        OSError: the store cannot be asked.
    """
    marker = Store(final, Patience(patience_seconds)).get((final / MARKER_NAME).key)
    return (marker or b"").endswith(nonce)


class StagedObject:
    """A single file that is put into a store as one object when it is whole.

    Pieces are kept until then: views must keep their contents.

    Args:
        final: The object.
        size_bytes: What it will measure, unless `commit` says otherwise.
        patience_seconds: How long the store may fail before that is an error.
    """

    def __init__(self, final: Address, *, size_bytes: int, patience_seconds: float) -> None:
        self.final = final
        self._size_bytes = size_bytes
        self._store = Store(final, Patience(patience_seconds))
        self._pieces: dict[int, bytes | memoryview] = {}

    def __enter__(self) -> StagedObject:
        return self

    def __exit__(self, *_: object) -> None:
        self._pieces = {}

    def write(self, content: bytes | memoryview, offset: int, *, io_threads: int = 1) -> None:
        """Takes the piece that begins at `offset`; pieces follow each other without gaps."""
        self._pieces[offset] = content

    def commit(self, size_bytes: int | None = None) -> None:
        """Puts the object, in place of an older one; up to then, or if this fails, the older one is there, whole.

        Args:
            size_bytes: What it measures, where that was not known before.

        Raises:
            OSError: nobody can tell that it is there.
        """
        whole = b"".join(self._pieces[offset] for offset in sorted(self._pieces))
        self._store.put(self.final.key, whole[: self._size_bytes if size_bytes is None else size_bytes])


def _is_data(path: str) -> bool:
    return path.rpartition("/")[0].rpartition("/")[2] == "d"
