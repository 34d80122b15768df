"""What a checkpoint carries beside its arrays: a tree of values, packed in shared memory and written as one file.

    file = head  tree  zeros  array*     arrays start on multiples of 64
    head = magic  bytes of the tree (u64)  CRC-32C of the tree (u32)  zeros (u32)     little-endian
    tree = JSON: {"value": ..., "arrays": [[dtype, shape, offset, CRC-32C], ...]}

Every JSON object in `value` has one key, which is a tag: {"dict": [[key, value], ...]}, {"tuple": [...]},
{"array": n}, {"scalar": n}, {"numbers": n} (a long list of ints or floats), {"float": "nan"}.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import tempfile
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import ml_dtypes
import numpy as np

from offstep._native import crc32c
from offstep.errors import CheckpointDamaged
from offstep.stores.path import Readable

Value = Any  # None, bool, int, float, str, bytes, NumPy arrays and scalars; lists, tuples and dicts of such

EXTRA_NAME = "offstep-user-extra"
"""File in a checkpoint with what a user of `Checkpointer` wanted to keep."""

_MAGIC = b"offxtra1"
_HEAD = struct.Struct("<8sQII")
_ALIGNMENT = 64
_PAGE_BYTES = 4096
_LONG_LIST = 64
_PLAIN = (bool, int, str, type(None))


class Attachment:
    """Bytes in anonymous shared memory that the writer process can map; freed with the last reference.

    Attributes:
        fd: The descriptor behind it.
        size_bytes: Its length.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.fd = _make_file()
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, size_bytes)


def _make_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("offstep-attachment", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def attach_text(text: str) -> Attachment:
    """Returns a text, with spaces at its end up to a whole page."""
    content = text.encode()
    attachment = Attachment(_round_up(len(content), _PAGE_BYTES))
    with mmap.mmap(attachment.fd, attachment.size_bytes) as memory:
        memory[:] = content.ljust(attachment.size_bytes)
    return attachment


def pack(value: Value) -> Attachment:
    """Packs a tree of values.

    Raises:
        TypeError: there is something in it that cannot be packed.
    """
    arrays: list[np.ndarray] = []
    tree = _encode(value, arrays)
    offsets, size_bytes = _place(arrays)
    entries = [
        [array.dtype.name, list(array.shape), offset, crc32c(_bytes_of(array))]
        for array, offset in zip(arrays, offsets, strict=True)
    ]
    text = json.dumps({"value": tree, "arrays": entries}, allow_nan=False).encode()
    start = _round_up(_HEAD.size + len(text), _ALIGNMENT)
    # Whole pages can be written with direct I/O.
    attachment = Attachment(_round_up(start + size_bytes, _PAGE_BYTES))
    with mmap.mmap(attachment.fd, attachment.size_bytes) as image:
        image[: _HEAD.size] = _HEAD.pack(_MAGIC, len(text), crc32c(text), 0)
        image[_HEAD.size : _HEAD.size + len(text)] = text
        for array, offset in zip(arrays, offsets, strict=True):
            image[start + offset : start + offset + array.nbytes] = _bytes_of(array).data
    return attachment


def read(path: Readable) -> Value:
    """Reads a packed tree back.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointDamaged: it is not what was written.
    """
    data = path.read_bytes()
    if len(data) < _HEAD.size or not data.startswith(_MAGIC):
        raise CheckpointDamaged(f"{path}: it is cut off, or no file of offstep's")
    _, text_bytes, checksum, _ = _HEAD.unpack_from(data)
    text = data[_HEAD.size : _HEAD.size + text_bytes]
    if crc32c(text) != checksum:
        raise CheckpointDamaged(f"{path}: the checksum of its head is wrong")
    tree = json.loads(text)
    start = _round_up(_HEAD.size + text_bytes, _ALIGNMENT)
    arrays = [_read_array(data, start, entry, path) for entry in tree["arrays"]]
    return _decode(tree["value"], arrays)


def read_extra(checkpoint: Readable) -> dict[str, Value]:
    """Reads what a user of `Checkpointer` wanted to keep with a checkpoint; empty where there is nothing.

    Raises:
        CheckpointDamaged: it is not what was written.
    """
    try:
        extra: dict[str, Value] = read(checkpoint / EXTRA_NAME)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return extra


def _read_array(data: bytes, start: int, entry: list[Any], path: Readable) -> np.ndarray:  # as `pack` wrote it
    name, shape, offset, checksum = entry
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    body = data[start + offset : start + offset + math.prod(shape) * dtype.itemsize]
    if crc32c(body) != checksum:
        raise CheckpointDamaged(f"{path}: the checksum of an array in it is wrong")
    return np.frombuffer(body, dtype).reshape(shape).copy()


def is_packable(value: Value) -> bool:
    """Returns whether `pack` takes the value."""
    try:
        _encode(value, [])
    except TypeError:
        return False
    return True


def packable_items(items: Mapping[str, Value] | None) -> dict[str, Value] | None:
    """Returns a copy of what can be packed of a dict."""
    return None if items is None else {name: value for name, value in items.items() if is_packable(value)}


def is_same(first: Value, second: Value) -> bool:
    """Returns whether two values are equal bit for bit; NaN equals NaN, and 1 does not equal 1.0."""
    if first is second and not isinstance(first, (list, dict, np.ndarray)):
        return True
    if type(first) is not type(second):
        return False
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(is_same, first, second))
    if isinstance(first, dict):
        return list(first) == list(second) and all(is_same(value, second[key]) for key, value in first.items())
    if isinstance(first, (np.ndarray, np.generic)):
        return (first.dtype, first.shape) == (second.dtype, second.shape) and first.tobytes() == second.tobytes()
    return bool(first == second) or (isinstance(first, float) and math.isnan(first) and math.isnan(second))


def _encode(value: Value, arrays: list[np.ndarray]) -> Any:  # JSON
    if type(value) in _PLAIN:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    for kind, encode in _ENCODERS:
        if isinstance(value, kind):
            return encode(value, arrays)
    raise TypeError(f"cannot be kept with a checkpoint: {type(value).__name__}")


def _encode_list(value: list[Value], arrays: list[np.ndarray]) -> Any:
    if len(value) >= _LONG_LIST and len(kinds := set(map(type, value))) == 1 and kinds <= {int, float}:
        with suppress(OverflowError):  # more than 64 bits: one by one
            return {"numbers": _add(np.array(value, np.int64 if int in kinds else np.float64), arrays)}
    return [_encode(item, arrays) for item in value]


def _encode_dict(value: dict[Value, Value], arrays: list[np.ndarray]) -> Any:
    return {"dict": [[_encode(key, arrays), _encode(item, arrays)] for key, item in value.items()]}


_ENCODERS: tuple[tuple[type | tuple[type, ...], Callable[[Any, list[np.ndarray]], Any]], ...] = (
    (np.ndarray, lambda value, arrays: {"array": _add(value, arrays)}),
    (np.generic, lambda value, arrays: {"scalar": _add(np.asarray(value), arrays)}),
    (bytes, lambda value, arrays: {"bytes": _add(np.frombuffer(value, np.uint8), arrays)}),
    (tuple, lambda value, arrays: {"tuple": [_encode(item, arrays) for item in value]}),
    (list, _encode_list),
    (dict, _encode_dict),
)


def _add(array: np.ndarray, arrays: list[np.ndarray]) -> int:
    if array.dtype.kind not in "biufc" and not hasattr(ml_dtypes, array.dtype.name):
        raise TypeError(f"cannot be kept with a checkpoint: an array of {array.dtype}")
    arrays.append(np.asarray(array, array.dtype.newbyteorder("<"), order="C"))
    return len(arrays) - 1


def _decode(node: Any, arrays: list[np.ndarray]) -> Value:
    if isinstance(node, list):
        return [_decode(item, arrays) for item in node]
    if not isinstance(node, dict):
        return node
    ((tag, content),) = node.items()
    return _DECODERS[tag](content, arrays)


_DECODERS: dict[str, Callable[[Any, list[np.ndarray]], Value]] = {
    "float": lambda content, arrays: float(content),
    "array": lambda content, arrays: arrays[content],
    "scalar": lambda content, arrays: arrays[content][()],
    "bytes": lambda content, arrays: arrays[content].tobytes(),
    "numbers": lambda content, arrays: arrays[content].tolist(),
    "tuple": lambda content, arrays: tuple(_decode(item, arrays) for item in content),
    "dict": lambda content, arrays: {_decode(key, arrays): _decode(item, arrays) for key, item in content},
}


def _bytes_of(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _place(arrays: list[np.ndarray]) -> tuple[list[int], int]:
    offsets, end = [], 0
    for array in arrays:
        offsets.append(end)
        end = _round_up(end + array.nbytes, _ALIGNMENT)
    return offsets, end


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
