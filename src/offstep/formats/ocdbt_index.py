"""Decodes the index of an OCDBT database: which key lies where.

The counterpart of `ocdbt`, for what that module writes and a little more: several data files, values in nodes, any
number of levels. Whatever else TensorStore knows (compressed nodes, numbered manifests, a version tree) is refused
with `UnknownLayout`, so that the caller can ask TensorStore itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

from offstep._native import crc32c
from offstep.errors import CheckpointDamaged
from offstep.stores.client import TooShort
from offstep.stores.path import Readable, StorePath

_MANIFEST_MAGIC = 0x0CDB3A2A
_NODE_MAGIC = 0x0CDB20DE
_HEAD = struct.Struct(">I")
_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_HEAD_BYTES = 14
_UUID_BYTES = 16
_SINGLE, _UNCOMPRESSED = 0, 0
_OUT_OF_LINE = 1
_COMMIT_TIME_BYTES = 8
_MISSING = 2**64 - 1  # file offset of an empty tree


class UnknownLayout(Exception):
    """The database uses a part of the format that is not decoded here."""


class FileRange(NamedTuple):
    """A value that lies in a data file, named relative to the database."""

    file: str
    offset: int
    size: int


Index = dict[bytes, bytes | FileRange]
"""Key to value, in ascending order of the keys."""


def read_index(database: Readable) -> Index:
    """Reads manifest and nodes of the database in a directory, checking their checksums.

    Raises:
        UnknownLayout: ask TensorStore.
        CheckpointDamaged: a checksum or a length is wrong, or a file is missing.
    """
    try:
        root = _read_root(database / "manifest.ocdbt")
        index: Index = {}
        if root is not None:
            height, location = root
            _read_node(database, location, height, "", b"", index)
    except (IndexError, struct.error) as error:
        raise CheckpointDamaged(f"{database}: the index ends too early; restore another checkpoint") from error
    return index


class _Cursor:
    """Reads the fields of one manifest or node, one after another."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self.at = at

    def take(self, count: int) -> bytes:
        part = self._data[self.at : self.at + count]
        if len(part) != count:
            raise IndexError("past the end")
        self.at += count
        return part

    def varint(self) -> int:
        return self.varints(1)[0]

    def varints(self, count: int) -> list[int]:
        """Unsigned LEB128."""
        run = self._data[self.at : self.at + count]
        if run.isascii():  # each in a byte of its own, as nearly all are
            self.at += count
            if len(run) != count:
                raise IndexError("past the end")
            return list(run)
        data, at = self._data, self.at
        values = []
        for _ in range(count):
            value = shift = 0
            while (byte := data[at]) > 0x7F:
                value |= (byte & 0x7F) << shift
                shift += 7
                at += 1
            values.append(value | byte << shift)
            at += 1
        self.at = at
        return values

    def split(self, sizes: list[int]) -> list[bytes]:
        """Takes as many bytes as the sizes say, in pieces."""
        joined = self.take(sum(sizes))
        ends = list(accumulate(sizes))
        return [joined[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _open(data: bytes, magic: int, origin: str) -> _Cursor:
    """Checks head and checksum and returns a cursor behind the head."""
    if len(data) < _HEAD_BYTES + _CRC.size or _HEAD.unpack_from(data)[0] != magic:
        raise CheckpointDamaged(f"{origin}: it does not begin as an OCDBT index does; restore another checkpoint")
    if _LENGTH.unpack_from(data, _HEAD.size)[0] != len(data):
        raise CheckpointDamaged(f"{origin}: it has {len(data)} bytes, but says otherwise; restore another checkpoint")
    if crc32c(data[: -_CRC.size]) != _CRC.unpack_from(data, len(data) - _CRC.size)[0]:
        raise CheckpointDamaged(f"{origin}: its checksum is wrong; restore another checkpoint")
    version, compression = data[_HEAD_BYTES - 2], data[_HEAD_BYTES - 1]
    if version != 0 or compression != _UNCOMPRESSED:
        raise UnknownLayout(f"{origin}: version {version}, compression {compression}")
    return _Cursor(data, _HEAD_BYTES)


def _read_root(manifest: Readable) -> tuple[int, FileRange] | None:
    """Returns height and place of the newest version's root node; `None` for an empty database."""
    try:
        data = manifest.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointDamaged(f"{manifest} is missing; restore another checkpoint") from error
    cursor = _open(data, _MANIFEST_MAGIC, str(manifest))
    _skip_config(cursor)
    files = _read_file_table(cursor, "")
    count = cursor.varint()
    if count < 1:
        raise UnknownLayout("no version in the manifest")
    cursor.varints(count)  # generation numbers
    heights = cursor.take(count)
    columns = [cursor.varints(count) for _ in range(6)]
    cursor.take(_COMMIT_TIME_BYTES * count)
    # The versions ascend; older ones in the version tree do not matter.
    file, offset, size = (column[-1] for column in columns[:3])
    if offset == _MISSING:
        return None
    return heights[-1], FileRange(files[file][0], offset, size)


def _skip_config(cursor: _Cursor) -> None:
    cursor.take(_UUID_BYTES)
    kind, _, _ = cursor.varints(3)  # manifest kind, inline limit, node limit
    cursor.take(1)
    compression = cursor.varint()
    if kind != _SINGLE or compression != _UNCOMPRESSED:
        raise UnknownLayout(f"manifest kind {kind}, compression {compression}")


def _read_file_table(cursor: _Cursor, base: str) -> list[tuple[str, str]]:
    """Returns path and base path of each data file."""
    count = cursor.varint()
    prefixes = [0, *cursor.varints(count - 1)] if count else []
    suffixes = cursor.varints(count)
    bases = cursor.varints(count)
    files = []
    path = ""
    for prefix, suffix, base_bytes in zip(prefixes, cursor.split(suffixes), bases, strict=True):
        path = path[:prefix] + suffix.decode()
        files.append((base + path, base + path[:base_bytes]))
    return files


def _read_node(database: Readable, place: FileRange, height: int, base: str, prefix: bytes, index: Index) -> None:
    data = _read_range(database, place)
    cursor = _open(data, _NODE_MAGIC, str(database / place.file))
    if cursor.take(1)[0] != height:
        raise CheckpointDamaged(f"{database / place.file}: a node has another height than its parent says")
    files = _read_file_table(cursor, base)
    if height == 0:
        index.update(_read_leaf_entries(cursor, files, prefix))
        return
    for child, child_base, child_prefix in _read_children(cursor, files, prefix):
        _read_node(database, child, height - 1, child_base, child_prefix, index)


def _read_range(database: Readable, place: FileRange) -> bytes:
    path = database / place.file
    try:
        data = _read_bytes(path, place)
    except TooShort:
        data = b""
    except FileNotFoundError as error:
        raise CheckpointDamaged(f"{path} is missing; restore another checkpoint") from error
    if len(data) != place.size:
        raise CheckpointDamaged(
            f"{path} is truncated: its index should end at byte {place.offset + place.size}; restore another checkpoint"
        )
    return data


def _read_bytes(path: Readable, place: FileRange) -> bytes:
    if isinstance(path, StorePath):
        return path.read_range(place.offset, place.offset + place.size)
    with path.open("rb") as file:
        file.seek(place.offset)
        return file.read(place.size)


def _read_leaf_entries(
    cursor: _Cursor, files: list[tuple[str, str]], prefix: bytes
) -> Iterator[tuple[bytes, bytes | FileRange]]:
    count = cursor.varint()
    shared = [0, *cursor.varints(count - 1)]
    keys = _join_keys(shared, cursor.split(cursor.varints(count)), prefix)
    sizes = cursor.varints(count)
    kinds = cursor.take(count)
    far = [size for size, kind in zip(sizes, kinds, strict=True) if kind == _OUT_OF_LINE]
    numbers, offsets = cursor.varints(len(far)), cursor.varints(len(far))
    ranges = (
        FileRange(files[number][0], offset, size) for number, offset, size in zip(numbers, offsets, far, strict=True)
    )
    inline = iter(cursor.split([size for size, kind in zip(sizes, kinds, strict=True) if kind != _OUT_OF_LINE]))
    for key, kind in zip(keys, kinds, strict=True):
        yield key, next(ranges) if kind == _OUT_OF_LINE else next(inline)


def _read_children(
    cursor: _Cursor, files: list[tuple[str, str]], prefix: bytes
) -> Iterator[tuple[FileRange, str, bytes]]:
    count = cursor.varint()
    shared = [0, *cursor.varints(count - 1)]
    suffix_sizes = cursor.varints(count)
    common = cursor.varints(count)  # how much of a child's key the keys below it leave out
    keys = _join_keys(shared, cursor.split(suffix_sizes), b"")
    numbers, offsets, sizes = (cursor.varints(count) for _ in range(3))
    for key, left_out, number, offset, size in zip(keys, common, numbers, offsets, sizes, strict=True):
        path, base = files[number]
        yield FileRange(path, offset, size), base, prefix + key[:left_out]


def _join_keys(shared: list[int], suffixes: list[bytes], prefix: bytes) -> list[bytes]:
    keys = []
    key = b""
    for count, suffix in zip(shared, suffixes, strict=True):
        key = key[:count] + suffix
        keys.append(prefix + key)
    return keys
