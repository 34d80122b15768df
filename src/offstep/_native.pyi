"""Copies, checksums and writes, in C.

Each function releases the GIL while it works on more than a few kilobytes. Buffers are C-contiguous.
"""

from collections.abc import Sequence
from mmap import mmap
from os import PathLike
from typing import Any, TypeAlias

import numpy.typing as npt

# Before Python 3.12 the type system has no buffer protocol that NumPy takes part in. Any: every dtype will do.
_Writable: TypeAlias = bytearray | memoryview | mmap | npt.NDArray[Any]
_Readable: TypeAlias = bytes | _Writable

def gather(sources: Sequence[int], entries: _Readable, slot: _Writable, threads: int) -> None:
    """Copies ranges of many buffers into one slot.

    For each entry, `size` bytes at `sources[source] + source_offset` go to `slot[slot_offset:]`, then `pad` zero
    bytes, then, if `flags` is 1, the CRC-32C of those `size + pad` bytes as 4 bytes, little-endian. `entries` is a
    packed array of 40-byte structs; with NumPy:

        ENTRY = np.dtype(
            [
                ("source_offset", "<u8"),
                ("slot_offset", "<u8"),
                ("size", "<u8"),
                ("pad", "<u8"),
                ("source", "<u4"),
                ("flags", "<u4"),
            ]
        )

    `sources` are addresses; the caller keeps them alive and readable until the call returns, and sees to it that no
    two entries overlap in the slot. `threads` (1 to 256) counts the calling thread. May be called from several
    threads at once and after a fork; one call at a time has the helper threads, others work alone.

    Raises:
        ValueError: an entry leaves the slot, or names a source that is not there. Nothing was copied.
    """

def crc32c(data: _Readable, crc: int = 0) -> int:
    """Returns the CRC-32C (RFC 3720; zarr3's `crc32c` codec) of `data`, continuing from `crc`."""

def fletcher32(data: _Readable, checksum: int = 0) -> int:
    """Returns HDF5's Fletcher-32 of `data`, continuing from that of what comes before, of an even length."""

def count_nonfinite(data: _Readable, ranges: _Readable) -> int:
    """Returns how many elements in some ranges of `data` are NaN or infinite.

    `ranges` is a packed array of 24-byte structs; `kind` is 0 for float16, 1 for bfloat16, 2 for float32, 3 for
    float64, little-endian and at any offset; with NumPy:

        RANGE = np.dtype([("offset", "<u8"), ("size", "<u8"), ("kind", "<u4"), ("reserved", "<u4")])

    Raises:
        ValueError: a range leaves the data, or does not hold whole elements of a known kind.
    """

def prefault(slot: _Writable, threads: int) -> None:
    """Makes all pages of the slot present, in huge pages where the system grants them; changes no byte.

    Raises:
        OSError: the memory is not to be had.
    """

def write_at(fd: int, data: _Readable, offset: int, block_bytes: int, threads: int) -> None:
    """Writes all of `data` at `offset`, in blocks of `block_bytes`, `threads` of them in flight.

    Interrupted and short writes are continued. With `O_DIRECT` the caller aligns address, size, offset and block.

    Raises:
        OSError: the first failure, with its `errno`. What was written by then is unspecified.
    """

def rename_exchange(
    first: str | bytes | PathLike[str] | PathLike[bytes],
    second: str | bytes | PathLike[str] | PathLike[bytes],
    directory: int = ...,
    /,
) -> None:
    """Swaps two paths atomically; relative ones begin at the descriptor `directory`, else at the working directory.

    Raises:
        OSError: with `errno.ENOSYS` or `errno.EINVAL` where system or file system cannot.
    """

def claim(cell: _Writable, number: int, /) -> bool:
    """Replaces `number` by 0 in the first 8 bytes of `cell`, in the machine's byte order, if it is there.

    Atomic, also between processes that share the memory: of all who claim a number, one gets `True`.

    Raises:
        ValueError: the cell is too small, or not aligned to 8 bytes.
    """

def cpu_features() -> str:
    """Names the instruction sets that are used here, e.g. `"sse4.2 avx2 avx512 vpclmul"`."""

def fail_exit() -> None:
    """Makes this process end with status 1 where it would end with 0, after everything else has been done at exit."""
