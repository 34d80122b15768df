"""Opens Keras's own files for reading: `.weights.h5`, and the one inside of a `.keras` archive."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from offstep import commit
from offstep.errors import CheckpointDamaged, UnsupportedFormat
from offstep.formats import file_manifest
from offstep.formats.hdf5_checksums import CHECKSUM_BYTES
from offstep.formats.hdf5_index import UnknownLayout, list_datasets
from offstep.formats.orbax_reader import parse_manifest
from offstep.host_memory import make_array
from offstep.stored import Contents, Region, StoredLeaf, as_dtype
from offstep.stores.path import Readable

SUFFIXES = (".weights.h5", ".keras")
LEGACY_SUFFIX = ".h5"  # it may be anybody's, so that no such file is looked for in a directory

_MEMBER = "model.weights.h5"
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_BLOCK_BYTES = 1 << 20
# As Keras does: a file that declares more than this, and far more than it stores, is made to fill the memory.
_BOMB_FLOOR_BYTES = 1 << 32
_BOMB_EXPANSION = 1000


class KerasReader:
    """The datasets of one file; a `stored.Reader`. A leaf's path is that of its dataset.

    The archive's CRC-32 covers its weights, our manifest a bare `.weights.h5`; one of stock Keras has no checksums.

    Args:
        path: The file.
        copy: Of this machine, where `path` is in a store; it is deleted with `close`.

    Raises:
        UnsupportedFormat: it is no such file.
        CheckpointDamaged: it is truncated, or not readable as HDF5.
    """

    def __init__(self, path: Readable, copy: Path | None = None) -> None:
        import h5py  # Orbax directories are read without it

        self.path: Readable = path
        self._copy = copy
        self._local = path if copy is None and isinstance(path, Path) else copy or Path()
        assert self._local.name, "what is in a store is read from a copy"
        self._file: BinaryIO = self._local.open("rb")
        self._archive: zipfile.ZipFile | None = None
        self._start: int | None = 0  # of the HDF5 file within the file
        self._member_bytes = 0
        try:
            source = self._open_member() if path.name.endswith(".keras") else self._file
            self._h5 = h5py.File(source, "r")
            self._datasets = self._index_datasets() or _list_datasets(self._h5)
        except (OSError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
            self._close_file()
            if isinstance(error, (CheckpointDamaged, UnsupportedFormat)):
                raise
            raise CheckpointDamaged(f"{path} cannot be read as a Keras file ({error}); restore another one") from error
        leaves = tuple(
            StoredLeaf(tuple(name.split("/")), found.shape, found.dtype) for name, found in self._datasets.items()
        )
        self.contents = Contents(self._find_kind(), leaves, False, self._read_manifest())

    @property
    def is_checked_fast(self) -> bool:
        """Whether the file has a checksum; see `stored.Reader`."""
        return self._archive is not None or self._is_covered

    @property
    def _is_covered(self) -> bool:
        return self._archive is None and file_manifest.covers(self.contents.manifest.get("files", {}))

    def read(
        self, regions: Sequence[Region], threads: int, into: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """Returns the regions; see `stored.Reader`."""
        targets = (
            [make_array(region.shape, as_dtype(region.leaf.dtype)) for region in regions] if into is None else into
        )
        for region, target in zip(regions, targets, strict=True):
            offset = self._find_offset(region) if target.flags.c_contiguous else None
            if offset is None:
                target[...] = self._read_by_hdf5(region)
            else:
                self._read_at(offset, target, region.leaf)
        return list(targets)

    def verify(self, leaves: Sequence[StoredLeaf], threads: int) -> None:
        """Checks the file's checksum; without one its reading is tried, in which HDF5 checks what it can."""
        if self._archive is not None:
            self._check_member()
        elif self._is_covered:
            problem = file_manifest.check(self._local, self.contents.manifest["files"])
            if problem is not None:
                raise CheckpointDamaged(f"{self.path} is damaged ({problem}); restore another checkpoint")
        else:
            for leaf in leaves:
                self._read_by_hdf5(Region(leaf))

    def close(self) -> None:
        """Closes the file."""
        self._h5.close()
        self._close_file()

    @property
    def file(self) -> Path:
        """What is read; see `stored.Reader`."""
        return self._local

    def _close_file(self) -> None:
        self._file.close()
        if self._copy is not None:
            commit.delete(self._copy)

    def _open_member(self) -> io.RawIOBase | io.BytesIO:
        self._archive = zipfile.ZipFile(self._file)
        try:
            info = self._archive.getinfo(_MEMBER)
        except KeyError as error:
            raise UnsupportedFormat(f"{self.path} has no {_MEMBER}: it is no .keras file of Keras 3") from error
        if info.compress_type != zipfile.ZIP_STORED:
            _refuse_bomb(_MEMBER, info.file_size, info.compress_size)
            self._start = None  # in memory only
            return io.BytesIO(self._archive.read(info))
        self._start, self._member_bytes = self._find_data(info), info.file_size
        return _Window(self._file, self._start, info.file_size)

    def _index_datasets(self) -> dict[str, _Dataset] | None:
        """Lists the datasets without h5py but for one of each type; `None` where h5py has to be asked for all."""
        if self._start is None:
            return None
        size = self._file.seek(0, os.SEEK_END) - self._start if self._archive is None else self._member_bytes
        try:
            found = list_datasets(self._file.fileno(), self._start, size)
        except UnknownLayout:
            return None
        samples = {dataset.kind: name for name, dataset in reversed(found.items())}
        known = {kind: _describe(name, self._h5[name]) for kind, name in samples.items()}
        for kind, name in samples.items():
            if (found[name].shape, found[name].offset) != (known[kind].shape, self._h5[name].id.get_offset()):
                return None
        return {
            name: known[dataset.kind]._replace(
                shape=dataset.shape, offset=dataset.offset if known[dataset.kind].is_plain else None
            )
            for name, dataset in found.items()
        }

    def _find_kind(self) -> str:
        if self._archive is not None:
            return "keras_archive"
        if "layer_names" in self._h5.attrs or "model_weights" in self._h5:
            return "keras_legacy"
        if not self.path.name.endswith(SUFFIXES):
            self.close()
            raise UnsupportedFormat(f"{self.path} is HDF5, but holds no model of Keras")
        return "keras_weights"

    def _find_data(self, info: zipfile.ZipInfo) -> int:
        """Returns where in the file a stored member's bytes begin."""
        self._file.seek(info.header_offset)
        header = self._file.read(_LOCAL_HEADER.size)
        if len(header) != _LOCAL_HEADER.size or header[:4] != b"PK\3\4":
            raise CheckpointDamaged(
                f"{self.path}: the header of {info.filename} is damaged; restore another checkpoint"
            )
        *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        return info.header_offset + _LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes)

    def _check_member(self) -> None:
        assert self._archive is not None
        info = self._archive.getinfo(_MEMBER)
        try:
            with self._archive.open(info) as member:  # compares the CRC-32 at its end
                while member.read(_BLOCK_BYTES):
                    pass
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise CheckpointDamaged(
                f"{self.path}: {_MEMBER} is damaged ({error}); restore another checkpoint"
            ) from error

    def _read_manifest(self) -> Mapping[str, Any]:
        text = file_manifest.read_text(self._local)
        return parse_manifest(text, self.path) if text else {}

    def _find_offset(self, region: Region) -> int | None:
        """Returns where in the file a region lies in one piece, in our byte order; `None` if it does not."""
        offset = self._datasets[region.leaf.name].offset
        first = _find_first(region)
        if self._start is None or offset is None or first is None:
            return None
        return self._start + offset + first * as_dtype(region.leaf.dtype).itemsize

    def _read_at(self, offset: int, target: np.ndarray, leaf: StoredLeaf) -> None:
        pending = target.reshape(-1).view(np.uint8).data
        while pending.nbytes:
            count = os.preadv(self._file.fileno(), [pending], offset)
            if count == 0:
                raise CheckpointDamaged(f"{leaf.name}: {self.path} ends within it; restore another checkpoint")
            pending, offset = pending[count:], offset + count

    def _read_by_hdf5(self, region: Region) -> np.ndarray:
        try:
            found = self._h5[region.leaf.name][tuple(slice(start, stop) for start, stop in region.box)]
        except (OSError, RuntimeError) as error:
            raise CheckpointDamaged(
                f"{region.leaf.name}: it cannot be read from {self.path} ({error}); restore another checkpoint"
            ) from error
        host = np.ascontiguousarray(found).reshape(region.shape)
        dtype = as_dtype(region.leaf.dtype)
        return host if host.dtype == dtype else host.view(dtype) if host.dtype.kind == "V" else host.astype(dtype)


def _find_first(region: Region) -> int | None:
    """Returns the number of a region's first element, where the others follow it in one piece; else `None`."""
    first, is_one = 0, True  # whether along all axes so far one row is wanted
    for (start, stop), size in zip(region.box, region.leaf.shape, strict=True):
        if (start, stop) != (0, size) and not is_one:
            return None
        first = first * size + start
        is_one = is_one and stop - start == 1
    return first


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:  # any writable buffer
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._at))
        self._file.seek(self._start + self._at)
        found = self._file.readinto(view[:count])  # type: ignore[attr-defined]  # it is a real file
        self._at += found
        return int(found)


class _Dataset(NamedTuple):
    """What is known of a dataset; `offset` in the HDF5 file is that of values that are plain and in one piece."""

    shape: tuple[int, ...]
    dtype: str
    offset: int | None
    is_plain: bool  # elements are in our byte order, and as long as we take them to be


def _list_datasets(h5: Any) -> dict[str, _Dataset]:  # of h5py
    """Returns the datasets by path. Only what lies in the file itself: no link leads out of it."""
    import h5py

    found: dict[str, _Dataset] = {}

    def visit(group: Any, prefix: str) -> None:
        for name in group:
            if group.get(name, getclass=True, getlink=True) is not h5py.HardLink:
                raise UnsupportedFormat(f"{prefix}{name} is a link out of the file, which Keras does not write")
            value = group[name]
            if isinstance(value, h5py.Group):
                visit(value, f"{prefix}{name}/")
            else:
                found[f"{prefix}{name}"] = _describe(f"{prefix}{name}", value)

    visit(h5, "")
    return found


def _check_dataset(name: str, dataset: Any) -> None:  # of h5py
    if dataset.external or dataset.is_virtual:
        raise UnsupportedFormat(f"{name}: its values lie outside of the file, which Keras does not write")
    _refuse_bomb(name, dataset.size * dataset.dtype.itemsize, dataset.id.get_storage_size())


def _refuse_bomb(name: str, declared_bytes: int, stored_bytes: int) -> None:
    if declared_bytes > _BOMB_FLOOR_BYTES and declared_bytes > _BOMB_EXPANSION * stored_bytes:
        raise UnsupportedFormat(f"{name} declares {declared_bytes:,} bytes, but stores {stored_bytes:,}")


def _describe(name: str, dataset: Any) -> _Dataset:  # of h5py
    _check_dataset(name, dataset)
    dtype = str(dataset.attrs.get("dtype", dataset.dtype.name))
    is_plain = bool(dataset.dtype.isnative) and dataset.dtype.itemsize == as_dtype(dtype).itemsize
    return _Dataset(tuple(dataset.shape), dtype, _find_values(dataset) if is_plain else None, is_plain)


def _find_values(dataset: Any) -> int | None:  # of h5py
    """Returns where the values of a dataset lie in one piece; `None` where they do not."""
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        return None if offset is None else int(offset)
    is_plain = dataset.fletcher32 and not (dataset.compression or dataset.shuffle or dataset.scaleoffset)
    if dataset.chunks != dataset.shape or not is_plain or dataset.id.get_num_chunks() != 1:
        return None
    chunk = dataset.id.get_chunk_info(0)
    return int(chunk.byte_offset) if chunk.size == dataset.nbytes + CHECKSUM_BYTES else None
