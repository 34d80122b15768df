"""The frame of a ZIP archive whose members are stored uncompressed: headers before members, directory behind them.

Layouts are from APPNOTE.TXT 6.3.10 (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT), sections 4.3.7
(local header), 4.3.12 (central directory), 4.3.14 to 4.3.16 (its end) and 4.5.3 (ZIP64).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<IIQI")
_LOCAL_SIGNATURE, _CENTRAL_SIGNATURE, _END_SIGNATURE = 0x04034B50, 0x02014B50, 0x06054B50
_END64_SIGNATURE, _LOCATOR64_SIGNATURE = 0x06064B50, 0x07064B50
_VERSION, _VERSION64 = 20, 45
_UTF8 = 0x800
_UNIX = 3 << 8
_MODE = 0o100644 << 16
_ZIP64_TAG = 1
_PADDING_TAG = 0xD935  # as Android's zipalign has it
_MOST_16, _MOST_32 = 0xFFFF, 0xFFFFFFFF

SMALLEST_PADDING = 4

Moment = tuple[int, int, int, int, int, int]
"""Local time: year, month, day, hour, minute, second."""


@dataclass(frozen=True)
class Member:
    """One file of an archive.

    Attributes:
        name: Parts separated by `/`.
        size: Bytes of its contents.
        crc: CRC-32 of its contents.
        offset: Where its local header starts.
        is_zip64: Whether the local header gives the size in 64 bits; from 4 GiB on it must.
        padding: Zeros in the local header, at least `SMALLEST_PADDING` if any: readers skip them.
    """

    name: str
    size: int
    crc: int
    offset: int
    is_zip64: bool = False
    padding: int = 0


def encode_header(member: Member, moment: Moment) -> bytes:
    """Returns the local header, which the contents follow at once."""
    name, flags = _encode_name(member.name)
    extra = struct.pack("<HHQQ", _ZIP64_TAG, 16, member.size, member.size) if member.is_zip64 else b""
    if member.padding:
        extra += struct.pack("<HH", _PADDING_TAG, member.padding - SMALLEST_PADDING).ljust(member.padding, b"\0")
    size = _MOST_32 if member.is_zip64 else member.size
    version = _VERSION64 if member.is_zip64 else _VERSION
    time, date = _encode_moment(moment)
    fields = (_LOCAL_SIGNATURE, version, flags, 0, time, date, member.crc, size, size, len(name), len(extra))
    return _LOCAL.pack(*fields) + name + extra


def encode_directory(members: Sequence[Member], moment: Moment, offset: int, comment: bytes = b"") -> bytes:
    """Returns what ends the archive: the directory, which starts at `offset`, its end, and a comment below 64 KiB."""
    entries = b"".join(_encode_entry(member, moment) for member in members)
    count, size = len(members), len(entries)
    end64 = b""
    if count >= _MOST_16 or size >= _MOST_32 or offset >= _MOST_32:
        version = (_VERSION64, _VERSION64)
        record = _END64.pack(_END64_SIGNATURE, _END64.size - 12, *version, 0, 0, count, count, size, offset)
        end64 = record + _LOCATOR64.pack(_LOCATOR64_SIGNATURE, 0, offset + size, 1)
    count, size, offset = min(count, _MOST_16), min(size, _MOST_32), min(offset, _MOST_32)
    end = _END.pack(_END_SIGNATURE, 0, 0, count, count, size, offset, len(comment))
    return entries + end64 + end + comment


def _encode_entry(member: Member, moment: Moment) -> bytes:
    name, flags = _encode_name(member.name)
    large = [value for value in (member.size, member.size, member.offset) if value >= _MOST_32]
    extra = struct.pack(f"<HH{len(large)}Q", _ZIP64_TAG, 8 * len(large), *large) if large else b""
    size, offset = min(member.size, _MOST_32), min(member.offset, _MOST_32)
    version = _VERSION64 if large or member.is_zip64 else _VERSION
    time, date = _encode_moment(moment)
    fields = (_CENTRAL_SIGNATURE, _UNIX | version, version, flags, 0, time, date, member.crc, size, size)
    return _CENTRAL.pack(*fields, len(name), len(extra), 0, 0, 0, _MODE, offset) + name + extra


def _encode_name(name: str) -> tuple[bytes, int]:
    return (name.encode(), 0) if name.isascii() else (name.encode(), _UTF8)


def _encode_moment(moment: Moment) -> tuple[int, int]:
    year, month, day, hour, minute, second = moment
    return hour << 11 | minute << 5 | second // 2, (year - 1980) << 9 | month << 5 | day
