"""Reads every chunk of the arrays in an OCDBT database through TensorStore, and compares it with its checksum."""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorstore as ts

from offstep._native import crc32c
from offstep.plans import item_bytes
from offstep.records import CRC_BYTES, Problem

_ZARR_JSON = "zarr.json"
_ZARR2_JSON = ".zarray"
_AHEAD_BYTES = 64 << 20

Json = Any  # what `json` makes of a document
Store = Any  # tensorstore.KvStore, which carries no types


@dataclass(frozen=True)
class CheckedLeaf:
    """What was found out about one array.

    Attributes:
        name: As Orbax names it; empty for the database as a whole.
        problems: What is wrong with it.
        checked_bytes: How many bytes agree with a checksum.
        has_checksums: Whether its chunks carry any.
    """

    name: str
    problems: tuple[Problem, ...] = ()
    checked_bytes: int = 0
    has_checksums: bool = True


def check_database(item: Path, expected: Iterable[str]) -> Iterator[CheckedLeaf]:
    """Yields what was found out about each array of an item, in the order of their names.

    The nodes of the database have checksums of their own, which TensorStore compares when it reads them.

    Args:
        item: Directory that holds `manifest.ocdbt`.
        expected: Names of the arrays that must be there.
    """
    try:
        store = _open(item)
        keys = store.list().result()
    except ValueError as error:
        yield CheckedLeaf("", (Problem("manifest.ocdbt", "a readable index", _first_line(error)),))
        return
    chunks: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        name, _, rest = key.decode(errors="replace").partition("/")
        chunks[name].add(rest)
    most_bytes = sum(path.stat().st_size for path in item.rglob("*") if path.is_file())
    for name in sorted(chunks.keys() | set(expected)):
        yield _check_leaf(store, item, name, chunks[name], most_bytes)


def _open(item: Path) -> Store:
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item.absolute()}/"}}
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    return ts.KvStore.open(spec, context=context).result()


def _check_leaf(store: Store, item: Path, name: str, keys: set[str], most_bytes: int) -> CheckedLeaf:
    if _ZARR2_JSON in keys:
        return _check_zarr2(store, item, name)
    if _ZARR_JSON not in keys:
        return CheckedLeaf(name, (Problem(name, "an array", "none"),))
    try:
        metadata = json.loads(store.read(f"{name}/{_ZARR_JSON}").result().value)
        shape, chunk_shape = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
        codecs = [codec["name"] for codec in metadata["codecs"]]
        size = math.prod(chunk_shape) * item_bytes(metadata["data_type"])
        grid = [-(-whole // part) for whole, part in zip(shape, chunk_shape, strict=True)]
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        return CheckedLeaf(name, (Problem(name, "the description of an array", _first_line(error)),))
    if size > most_bytes and codecs == ["bytes", "crc32c"]:
        return CheckedLeaf(name, (Problem(name, f"chunks of {size} bytes", f"{most_bytes} bytes in all"),))
    if codecs != ["bytes", "crc32c"]:
        return _decode_leaf(item, name, "zarr3", shape, chunk_shape)
    wanted = ["/".join(("c", *map(str, index))) for index in itertools.product(*map(range, grid))]
    problems, checked = [], 0
    for chunk, problem in _check_chunks(store, name, [chunk for chunk in wanted if chunk in keys], size):
        if problem is None:
            checked += size
        else:
            problems.append(Problem(f"{name}/{chunk}", *problem))
    problems += [Problem(f"{name}/{chunk}", "a chunk", "none") for chunk in wanted if chunk not in keys]
    return CheckedLeaf(name, tuple(problems), checked)


def _check_zarr2(store: Store, item: Path, name: str) -> CheckedLeaf:
    """The older format, which stock Orbax writes by default, has no checksums."""
    try:
        metadata = json.loads(store.read(f"{name}/{_ZARR2_JSON}").result().value)
        shape, chunk_shape = metadata["shape"], metadata["chunks"]
    except (ValueError, KeyError, TypeError) as error:
        return CheckedLeaf(name, (Problem(name, "the description of an array", _first_line(error)),))
    return _decode_leaf(item, name, "zarr", shape, chunk_shape)


def _check_chunks(
    store: Store, name: str, chunks: list[str], size: int
) -> Iterator[tuple[str, tuple[str, str] | None]]:
    """Yields each chunk with what was expected and what was found, if these differ; reads a few of them ahead."""
    ahead = max(1, min(64, _AHEAD_BYTES // (size + 1)))
    reads: deque[tuple[str, Any]] = deque()
    for chunk in chunks:
        reads.append((chunk, store.read(f"{name}/{chunk}")))
        if len(reads) >= ahead:
            yield _check_read(*reads.popleft(), size)
    for read in reads:
        yield _check_read(*read, size)


def _check_read(chunk: str, read: Any, size: int) -> tuple[str, tuple[str, str] | None]:
    try:
        value = memoryview(read.result().value)
    except ValueError as error:
        return chunk, ("a chunk", _first_line(error))
    if len(value) != size + CRC_BYTES:
        return chunk, (f"{size + CRC_BYTES} bytes", f"{len(value)} bytes")
    (expected,) = struct.unpack("<I", value[size:])
    found = crc32c(value[:size])
    return chunk, None if found == expected else (f"CRC-32C {expected:08x}", f"CRC-32C {found:08x}")


def _decode_leaf(item: Path, name: str, driver: str, shape: list[int], chunk_shape: list[int]) -> CheckedLeaf:
    """Reads what Orbax compressed, chunk by chunk: damage shows only where it can no longer be decoded."""
    base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item.absolute()}/"}, "path": f"{name}/"}
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    try:
        array = ts.open({"driver": driver, "kvstore": base}, context=context, read=True).result()
        starts = [range(0, whole, part) for whole, part in zip(shape, chunk_shape, strict=True)]
        for corner in itertools.product(*starts):
            window = tuple(
                slice(at, min(at + part, whole)) for at, part, whole in zip(corner, chunk_shape, shape, strict=True)
            )
            array[window].read().result()
    except ValueError as error:
        return CheckedLeaf(name, (Problem(name, "an array that can be decoded", _first_line(error)),), 0, False)
    return CheckedLeaf(name, has_checksums=False)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
