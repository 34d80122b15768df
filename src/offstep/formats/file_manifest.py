"""Where the manifest of a Keras file is: behind what stock readers look at.

    .weights.h5, .h5 = HDF5 file  manifest  length (8 bytes, little-endian)  mark       HDF5 knows its own end
    .keras           = ZIP archive, with the manifest as its comment

A further member of the archive would make stock `load_model` unpack all of them to the disk, in search of assets.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from offstep import manifest
from offstep._native import crc32c
from offstep.manifest import FileRecord, Manifest
from offstep.records import Job, Problem
from offstep.stores.path import Readable, StorePath

WEIGHTS_NAME = "model.weights.h5"
"""What a manifest calls the HDF5 file that it is about, in an archive or bare."""

_BLOCK_BYTES = 8 << 20
_FOOTER = struct.Struct("<Q8s")
_MARK = b"offstep\x01"
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SUPERBLOCK = struct.Struct("<8sB4xB26xQ")  # signature, version, size of offsets, end of the file
_CHECKED_SUPERBLOCK = struct.Struct("<8sBB18xQ")  # the same in version 3
_ARCHIVE_END, _ARCHIVE_END_BYTES = b"PK\x05\x06", 22  # of a ZIP archive, before its comment
_TAIL_BYTES = 1 << 17  # of an object in a store: enough for most manifests, and its whole size nobody tells
_MOST_COMMENT_BYTES = 65_535


def encode_trailer(job: Job, records: dict[str, FileRecord], nonfinite: int | None) -> bytes:
    """Returns what follows the HDF5 file."""
    text = manifest.build(job.manifest, records, nonfinite)
    return text + _FOOTER.pack(len(text), _MARK)


def append_trailer(file: IO[bytes], about: Mapping[str, Any]) -> None:  # JSON
    """Puts a manifest behind an HDF5 file that somebody else has written.

    Args:
        file: Open for reading and writing.
        about: What to say of it; see `manifest.build`.
    """
    file.flush()
    file.seek(0)
    size, crc = _add_up(file, os.fstat(file.fileno()).st_size)
    text = manifest.build(about, {WEIGHTS_NAME: FileRecord(size, crc)}, None)
    file.write(text + _FOOTER.pack(len(text), _MARK))


def encode_comment(job: Job, records: dict[str, FileRecord], nonfinite: int | None) -> bytes:
    """Returns the archive's comment; of one that would be too long, only what it says of the step and the run."""
    text = manifest.build(job.manifest, records, nonfinite)
    if len(text) > _MOST_COMMENT_BYTES:
        about: dict[str, Any] = {name: job.manifest[name] for name in ("step", "run") if name in job.manifest}
        text = manifest.build(about, {}, nonfinite)
    return text


def read(path: Readable) -> Manifest | None:
    """Reads the manifest of a `.keras` or `.weights.h5` file; `None` where there is none, as in what Keras wrote.

    Raises:
        ValueError: see `manifest.parse`.
        OSError: it cannot be read.
    """
    text = read_text(path)
    return manifest.parse(text) if text else None


def read_text(path: Readable) -> bytes:
    """Returns the text of the manifest of a file; empty where there is none."""
    if isinstance(path, StorePath):
        return find_text(path.read_tail(_TAIL_BYTES))
    return _read_comment(path) if zipfile.is_zipfile(path) else _read_trailer(path)


def _read_comment(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.comment if archive.comment.startswith(b'{"format_version"') else b""


def _read_trailer(path: Path) -> bytes:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < _FOOTER.size:
            return b""
        file.seek(size - _FOOTER.size)
        length, mark = _FOOTER.unpack(file.read(_FOOTER.size))
        if mark != _MARK or length > min(manifest.MAX_BYTES, size - _FOOTER.size):
            return b""
        file.seek(size - _FOOTER.size - length)
        return file.read(length)


def find_text(tail: bytes) -> bytes:
    """Returns the text of the manifest that ends a file, given the last bytes of it; empty where there is none."""
    if tail.endswith(_MARK):
        length, _ = _FOOTER.unpack(tail[-_FOOTER.size :])
        return tail[-_FOOTER.size - length : -_FOOTER.size]
    end = tail.rfind(_ARCHIVE_END)
    return tail[end + _ARCHIVE_END_BYTES :] if end >= 0 else b""


def covers(files: Mapping[str, FileRecord]) -> bool:
    """Returns whether the records of a manifest have a checksum of the HDF5 file that it follows."""
    return len(files) == 1 and all(record.crc32c is not None for record in files.values())


def find_fault(path: Path) -> str | None:
    """Says what is wrong with an HDF5 file that has no manifest, as far as its metadata tell.

    One of ours whose manifest was damaged ends in what is neither HDF5 nor a manifest; one that was cut short is
    shorter than it says.
    """
    import h5py  # only files without a checksum need it

    try:
        with h5py.File(path, "r"):
            pass
    except OSError as error:
        return str(error)
    with path.open("rb") as file:
        head = file.read(_SUPERBLOCK.size)
        beyond_bytes = file.seek(0, 2) - _read_end(head)
    return f"{beyond_bytes} bytes after its end that are no manifest" if _read_end(head) and beyond_bytes else None


def _read_end(head: bytes) -> int:
    """Returns where an HDF5 file says that it ends; 0 for versions of the format that we do not write.

    https://docs.hdfgroup.org/archive/support/HDF5/doc/H5.format.html, III.A
    """
    if len(head) < _SUPERBLOCK.size:
        return 0
    signature, version, offset_bytes, end = _SUPERBLOCK.unpack(head)
    if (signature, version, offset_bytes) == (_SIGNATURE, 0, 8):
        return int(end)
    signature, version, offset_bytes, end = _CHECKED_SUPERBLOCK.unpack_from(head)
    return int(end) if (signature, version, offset_bytes) == (_SIGNATURE, 3, 8) else 0


def check(path: Path, files: Mapping[str, FileRecord]) -> Problem | None:
    """Compares an HDF5 file with what its manifest says of it; for one that is covered."""
    [(name, record)] = files.items()
    size, crc = _checksum(path, record.size)
    if size != record.size:
        return Problem(name, f"{record.size} bytes", f"{size} bytes")
    return None if crc == record.crc32c else Problem(name, f"CRC-32C {record.crc32c:08x}", f"CRC-32C {crc:08x}")


def _checksum(path: Path, size: int) -> tuple[int, int]:
    """Returns how many of the first `size` bytes there are, and their CRC-32C."""
    with path.open("rb", buffering=0) as file:
        return _add_up(file, size)


def _add_up(file: IO[bytes], size: int) -> tuple[int, int]:
    crc = done = 0
    while block := file.read(min(_BLOCK_BYTES, size - done)):
        crc = crc32c(block, crc)
        done += len(block)
    return done, crc
