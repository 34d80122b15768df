"""The checksums that HDF5 itself verifies: Fletcher's behind a chunk, and Jenkins's lookup3 at the end of metadata.

As in the HDF5 File Format Specification 3.0 and HDF5's `H5checksum.c`.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence

from offstep import _native

CHECKSUM_BYTES = 4

_WORDS = struct.Struct("<III")
_LIMIT = 2**32 - 1
# Jenkins, lookup3.c, `mix` and `final`: how far each step rotates.
_MIX = (4, 6, 8, 16, 19, 4)
_FINAL = (14, 11, 25, 16, 4, 14, 24)


class ArrayChecksums:
    """Puts Fletcher's checksum behind each array of a slot, while the slot is gone through in pieces of any even size.

    Args:
        slot: It begins where the first piece does.
        arrays: Offset and size of each, in ascending order; 4 bytes behind each are free.
    """

    def __init__(self, slot: memoryview, arrays: Sequence[tuple[int, int]]) -> None:
        self._slot, self._arrays = slot, deque(arrays)
        self._at = self._sum = 0

    def extend(self, piece: memoryview, crc: int) -> int:
        """Finishes the arrays that end in the next piece, and returns the CRC-32C `crc` continued over the piece."""
        end = self._at + len(piece)
        while self._arrays and self._arrays[0][0] < end:
            offset, size = self._arrays[0]
            start, stop = max(offset, self._at), offset + size
            self._sum = _native.fletcher32(self._slot[start : min(stop, end)], self._sum if start > offset else 0)
            if stop > end:
                break
            self._slot[stop : stop + CHECKSUM_BYTES] = self._sum.to_bytes(CHECKSUM_BYTES, "little")
            self._arrays.popleft()
        self._at = end
        return _native.crc32c(piece, crc)


def seal(image: bytearray, block: slice) -> None:
    """Puts the checksum of a block of metadata into its last four bytes."""
    end = block.stop - CHECKSUM_BYTES
    image[end : block.stop] = lookup3(bytes(image[block.start : end])).to_bytes(CHECKSUM_BYTES, "little")


def lookup3(data: bytes) -> int:
    """Returns Jenkins's hash as HDF5 takes it for metadata."""
    a = b = c = (0xDEADBEEF + len(data)) & _LIMIT
    words = list(_WORDS.iter_unpack(data + bytes(-len(data) % _WORDS.size)))
    for number, (first, second, third) in enumerate(words, 1):
        a, b, c = (a + first) & _LIMIT, (b + second) & _LIMIT, (c + third) & _LIMIT
        if number < len(words):
            for bits in _MIX:
                a = ((a - c) & _LIMIT) ^ _rotate(c, bits)
                c = (c + b) & _LIMIT
                a, b, c = b, c, a
    if words:
        for bits in _FINAL:
            c = ((c ^ b) - _rotate(b, bits)) & _LIMIT
            a, b, c = b, c, a
        c = b
    return c


def _rotate(word: int, bits: int) -> int:
    return (word << bits | word >> (32 - bits)) & _LIMIT
