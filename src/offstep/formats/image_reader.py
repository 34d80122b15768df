"""Reads arrays straight out of an OCDBT database that holds plain chunks, as `orbax_directory` writes it.

Each chunk is the raw bytes followed by their CRC-32C. Chunks that lie close together in a file are fetched with one
read, so that thousands of small leaves cost a few system calls.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from offstep._native import crc32c
from offstep.errors import CheckpointDamaged
from offstep.formats.data_file import DataFile, open_data_file
from offstep.formats.ocdbt_index import FileRange, Index, UnknownLayout
from offstep.formats.orbax_directory import chunk_key
from offstep.host_memory import make_array
from offstep.parallel import run_all
from offstep.records import CRC_BYTES
from offstep.stored import Region, StoredLeaf, as_dtype
from offstep.stores.path import Readable, StorePath

_THREADS = "offstep-read"
_RUN_BYTES = 4 << 20
_RUN_GAP_BYTES = 4096
_OBJECT_BLOCK_BYTES = 16 << 20  # of an object in a store, where each request takes tens of milliseconds
_BLOCK_BYTES = 1 << 20  # of a check: what has been read is still in the cache when its checksum is taken
KEPT_BYTES = 32 << 20
"""What a check has read is kept up to this size, for the reading that follows it."""


@dataclass(frozen=True)
class ChunkedArray:
    """What an array's `zarr.json` says."""

    shape: tuple[int, ...]
    dtype: str
    chunk_shape: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(-(-whole // part) for whole, part in zip(self.shape, self.chunk_shape, strict=True))

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk_shape) * as_dtype(self.dtype).itemsize


class _Cut(NamedTuple):
    """Which part of a chunk fills which part of a region."""

    source: tuple[slice, ...]
    target: tuple[slice, ...]


class _Piece(NamedTuple):
    """One chunk to be fetched for a region; all of both where there is no cut."""

    leaf: StoredLeaf
    file: str
    offset: int
    size: int
    number: int
    chunk_shape: tuple[int, ...]
    cut: _Cut | None


@lru_cache(maxsize=4096)  # a model has thousands of leaves and a few dozen shapes
def parse_array(document: bytes) -> ChunkedArray:
    """Reads a `zarr.json`.

    Raises:
        UnknownLayout: its chunks are not plain bytes with a CRC-32C behind them.
    """
    data = json.loads(document)
    grid, encoding = data["chunk_grid"], data["chunk_key_encoding"]
    codecs = [(codec["name"], codec.get("configuration", {}).get("endian", "little")) for codec in data["codecs"]]
    is_plain = codecs == [("bytes", "little"), ("crc32c", "little")]
    separator = encoding.get("configuration", {}).get("separator", "/")
    if not is_plain or grid["name"] != "regular" or (encoding["name"], separator) != ("default", "/"):
        raise UnknownLayout(f"codecs {codecs}, grid {grid['name']}, keys {encoding['name']}")
    if not isinstance(data["data_type"], str):
        raise UnknownLayout(f"data type {data['data_type']}")
    return ChunkedArray(tuple(data["shape"]), data["data_type"], tuple(grid["configuration"]["chunk_shape"]))


class ImageReader:
    """The arrays of one OCDBT database in plain chunks.

    Args:
        database: Its directory.
        index: What `read_index` returned for it.

    Raises:
        UnknownLayout: an array is stored in another way.
        CheckpointDamaged: a data file is missing or shorter than its index says.
    """

    def __init__(self, database: Readable, index: Index) -> None:
        self._database = database
        self._index = index
        ending = b"/zarr.json"
        documents = [(key, value) for key, value in index.items() if key.endswith(ending)]
        self.arrays: Mapping[str, ChunkedArray] = {
            key[: -len(ending)].decode(): parse_array(_inline(value)) for key, value in documents
        }
        self._files: dict[str, DataFile] = {}
        self._block_bytes = _OBJECT_BLOCK_BYTES if isinstance(database, StorePath) else _BLOCK_BYTES
        self._kept: dict[tuple[str, int], np.ndarray] = {}  # checked chunks by file and offset
        try:
            self._open_files()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the data files."""
        for file in self._files.values():
            file.close()
        self._files = {}
        self._kept = {}

    def read(
        self, wanted: Sequence[tuple[str, Region]], threads: int, into: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """Returns regions of the named arrays; see `stored.Reader.read`."""
        pieces: list[_Piece] = []
        results: list[np.ndarray] = []
        for number, (name, region) in enumerate(wanted):
            found = list(self._pieces(name, region, number))
            pieces += found
            if into is not None:
                results.append(into[number])
            elif len(found) == 1 and found[0].cut is None:
                results.append(_NOTHING)  # to be replaced by a view of what is read
            else:
                results.append(make_array(region.shape, as_dtype(region.leaf.dtype)))
        missing = [piece for piece in pieces if not self._take_kept(piece, results)]
        run_all(lambda run: self._fetch(run, results), _group(missing), threads, _THREADS)
        return results

    def verify(self, names: Iterable[tuple[str, StoredLeaf]], threads: int, *, is_partial: bool = False) -> None:
        """Checks the chunks of the named arrays, with `is_partial` those that are there; see `stored.Reader.verify`."""
        pieces = [
            piece for name, leaf in names for piece in self._pieces(name, Region(leaf), 0, skips_missing=is_partial)
        ]
        if sum(piece.size for piece in pieces) <= KEPT_BYTES:
            run_all(self._keep, _group(pieces), threads, _THREADS)
        else:
            run_all(self._check_all, _spread(_group(pieces), threads), threads, _THREADS)

    def _open_files(self) -> None:
        ends: dict[str, int] = {}
        for value in self._index.values():
            if isinstance(value, FileRange):
                ends[value.file] = max(ends.get(value.file, 0), value.offset + value.size)
        for name, end in ends.items():
            path = self._database / name
            try:
                self._files[name] = open_data_file(path)
            except FileNotFoundError as error:
                raise CheckpointDamaged(f"{path} is missing; restore another checkpoint") from error
            fault = self._files[name].find_fault(end)
            if fault:
                raise CheckpointDamaged(f"{path} is truncated: {fault}; restore another checkpoint")

    def _pieces(self, name: str, region: Region, number: int, *, skips_missing: bool = False) -> Iterator[_Piece]:
        array = self.arrays[name]
        if 0 in array.shape:
            return
        if not skips_missing and array.chunk_shape == array.shape and region.is_whole:
            place = self._place(name, (0,) * len(array.shape), region.leaf)
            yield _Piece(region.leaf, *place, number, array.chunk_shape, None)
            return
        axes = list(zip(region.box, array.chunk_shape, strict=True))
        for position in product(*(range(start // part, -(-stop // part)) for (start, stop), part in axes)):
            if skips_missing and chunk_key(name, position) not in self._index:
                continue
            place = self._place(name, position, region.leaf)
            yield _Piece(region.leaf, *place, number, array.chunk_shape, _cut(position, axes))

    def _place(self, name: str, position: tuple[int, ...], leaf: StoredLeaf) -> tuple[str, int, int]:
        value = self._index.get(chunk_key(name, position))
        if value is None:
            raise CheckpointDamaged(f"{leaf.name}: a part of it is missing in {self._database}; restore another one")
        if isinstance(value, bytes):
            raise UnknownLayout(f"{name}: a chunk inside of the index")
        return value.file, value.offset, value.size

    # ------------------------------------------------------------------------------------------------- fetching

    def _fetch(self, run: list[_Piece], results: list[np.ndarray]) -> None:
        """Fills the regions of neighbouring chunks. Any thread; no two runs share a part of a region."""
        if len(run) == 1 and results[run[0].number] is not _NOTHING:
            part = _part(results, run[0])
            if part.flags.c_contiguous and _is_leading(run[0]):
                self._read_into(part, run[0])
                return
        for piece, chunk in self._load(run):
            _fill(results, piece, chunk)

    def _keep(self, run: list[_Piece]) -> None:
        for piece, chunk in self._load(run):
            self._kept[piece.file, piece.offset] = chunk

    def _take_kept(self, piece: _Piece, results: list[np.ndarray]) -> bool:
        chunk = self._kept.get((piece.file, piece.offset))
        if chunk is not None:
            _fill(results, piece, chunk)
        return chunk is not None

    def _load(self, run: list[_Piece]) -> Iterator[tuple[_Piece, np.ndarray]]:
        """Reads neighbouring chunks at once and yields each after checking it."""
        start, stop = run[0].offset, run[-1].offset + run[-1].size
        memory = make_array((stop - start,), np.dtype(np.uint8))  # chunks lie on multiples of 64 in the file
        self._read_fully(run[0], memory, start)
        for piece in run:
            raw = memory[piece.offset - start : piece.offset - start + piece.size]
            body, checksum = raw[:-CRC_BYTES], raw[-CRC_BYTES:]
            self._compare(piece, crc32c(body), checksum.tobytes())
            yield piece, body.view(as_dtype(piece.leaf.dtype)).reshape(piece.chunk_shape)

    def _read_into(self, part: np.ndarray, piece: _Piece) -> None:
        """Reads a chunk to where it belongs; what pads it is checked and dropped."""
        body = part.reshape(-1).view(np.uint8)
        crc = self._read_blocks(piece, body, 0, 0)
        padding = np.empty(piece.size - CRC_BYTES - body.nbytes, np.uint8)
        crc = self._read_blocks(piece, padding, body.nbytes, crc)
        self._compare(piece, crc, self._read_checksum(piece))

    def _read_blocks(self, piece: _Piece, target: np.ndarray, start: int, crc: int) -> int:
        """Reads bytes of a chunk from `start` on and returns their checksum, taken while they are in the cache."""
        for at in range(0, target.nbytes, self._block_bytes):
            block = target[at : at + self._block_bytes]
            self._read_fully(piece, block, piece.offset + start + at)
            crc = crc32c(block, crc)
        return crc

    def _read_checksum(self, piece: _Piece) -> bytes:
        checksum = np.empty(CRC_BYTES, np.uint8)
        self._read_fully(piece, checksum, piece.offset + piece.size - CRC_BYTES)
        return checksum.tobytes()

    def _check_all(self, runs: list[list[_Piece]]) -> None:
        for run in runs:
            self._check(run)

    def _check(self, run: list[_Piece]) -> None:
        if len(run) > 1:
            for _ in self._load(run):
                pass
            return
        [piece] = run
        block = np.empty(self._block_bytes, np.uint8)
        body_bytes, crc = piece.size - CRC_BYTES, 0
        for at in range(0, body_bytes, self._block_bytes):
            crc = self._read_blocks(piece, block[: min(self._block_bytes, body_bytes - at)], at, crc)
        self._compare(piece, crc, self._read_checksum(piece))

    def _read_fully(self, piece: _Piece, target: np.ndarray, offset: int) -> None:
        if target.nbytes and not self._files[piece.file].read_into(target.data, offset):
            raise CheckpointDamaged(f"{piece.leaf.name}: {self._database / piece.file} ends within it")

    def _compare(self, piece: _Piece, crc: int, stored: bytes) -> None:
        if crc != int.from_bytes(stored, "little"):
            raise CheckpointDamaged(
                f"{piece.leaf.name}: its checksum is wrong at byte {piece.offset} of {self._database / piece.file}, so "
                "its values are not those that were saved; restore another checkpoint"
            )


_NOTHING = np.empty(0, np.uint8)


def _inline(value: bytes | FileRange) -> bytes:
    if isinstance(value, FileRange):
        raise UnknownLayout("a zarr.json outside of the index")
    return value


def _group(pieces: list[_Piece]) -> list[list[_Piece]]:
    """Puts chunks together that are worth one read."""
    pieces.sort(key=lambda piece: (piece.file, piece.offset))
    runs: list[list[_Piece]] = []
    file, start, end = "", 0, 0
    for piece in pieces:
        stop = piece.offset + piece.size
        if runs and piece.file == file and 0 <= piece.offset - end <= _RUN_GAP_BYTES and stop - start <= _RUN_BYTES:
            runs[-1].append(piece)
        else:
            runs.append([piece])
            file, start = piece.file, piece.offset
        end = stop
    return runs


def _spread(runs: list[list[_Piece]], threads: int) -> list[list[list[_Piece]]]:
    """Gives each thread a part of the file that lies in one piece: reading ahead helps those who read in order."""
    limit = sum(piece.size for run in runs for piece in run) / threads
    parts: list[list[list[_Piece]]] = [[]]
    size = 0.0
    for run in runs:
        if size >= limit:
            parts.append([])
            size -= limit
        parts[-1].append(run)
        size += sum(piece.size for piece in run)
    return parts


def _cut(position: tuple[int, ...], axes: Sequence[tuple[tuple[int, int], int]]) -> _Cut:
    source, target = [], []
    for index, ((start, stop), part) in zip(position, axes, strict=True):
        low, high = max(start, index * part), min(stop, (index + 1) * part)
        source.append(slice(low - index * part, high - index * part))
        target.append(slice(low - start, high - start))
    return _Cut(tuple(source), tuple(target))


def _fill(results: list[np.ndarray], piece: _Piece, chunk: np.ndarray) -> None:
    """Puts what is wanted of a chunk where it is wanted, or the chunk itself where nobody has memory for it."""
    if results[piece.number] is _NOTHING:
        results[piece.number] = chunk
    else:
        _part(results, piece)[...] = chunk if piece.cut is None else chunk[piece.cut.source]


def _part(results: Sequence[np.ndarray], piece: _Piece) -> np.ndarray:
    """Returns the view of its region that a chunk fills; of an array without axes too."""
    result = results[piece.number]
    return result if piece.cut is None or not piece.cut.target else result[piece.cut.target]


def _is_leading(piece: _Piece) -> bool:
    """Returns whether what is wanted of a chunk are the first bytes of it."""
    if piece.cut is None:
        return True
    is_first = True  # along the axes so far, one row is wanted
    for part, size in zip(piece.cut.source, piece.chunk_shape, strict=True):
        if part.start != 0 or (part.stop != size and not is_first):
            return False
        is_first = is_first and part.stop == 1
    return True
