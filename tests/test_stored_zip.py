"""The frame of a ZIP archive, as Python's own reader sees it; also of one that is larger than 4 GiB."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from pathlib import Path

import pytest

from offstep.formats.stored_zip import Member, encode_directory, encode_header

MOMENT = (2026, 11, 21, 13, 59, 58)
LARGE = (4 << 30) + 123


def make_archive(contents: dict[str, bytes]) -> bytes:
    archive = bytearray()
    members = []
    for name, content in contents.items():
        members.append(Member(name, len(content), zlib.crc32(content), len(archive)))
        archive += encode_header(members[-1], MOMENT) + content
    return bytes(archive) + encode_directory(members, MOMENT, len(archive))


def test_members_come_back_in_their_order() -> None:
    contents = {"metadata.json": b"{}", "empty": b"", "assets/übung.txt": b"x" * 70_000}
    with zipfile.ZipFile(io.BytesIO(make_archive(contents))) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == contents
        assert archive.namelist() == list(contents)
        assert {member.date_time for member in archive.infolist()} == {MOMENT}


def test_no_member_is_an_archive_too() -> None:
    with zipfile.ZipFile(io.BytesIO(make_archive({}))) as archive:
        assert archive.namelist() == []


def test_more_members_than_16_bits_count_come_back() -> None:
    contents = {str(number): b"" for number in range(70_000)}
    with zipfile.ZipFile(io.BytesIO(make_archive(contents))) as archive:
        assert archive.namelist() == list(contents)


def test_a_damaged_member_is_found() -> None:
    damaged = bytearray(make_archive({"a": b"content"}))
    damaged[damaged.index(b"content")] ^= 1
    with zipfile.ZipFile(io.BytesIO(damaged)) as archive:
        assert archive.testzip() == "a"


def test_a_member_of_more_than_4_gib_and_one_behind_it_come_back(tmp_path: Path) -> None:
    path = tmp_path / "large.zip"  # all but a few bytes of it is a hole
    large = Member("large", LARGE, 0, 0, is_zip64=True)
    header = encode_header(large, MOMENT)
    behind = Member("behind", 3, zlib.crc32(b"abc"), len(header) + LARGE)
    with path.open("wb") as file:
        file.write(header)
        file.seek(behind.offset)
        file.write(encode_header(behind, MOMENT) + b"abc")
        file.write(encode_directory([large, behind], MOMENT, file.tell()))
    assert os.stat(path).st_blocks * 512 < 1 << 20
    with zipfile.ZipFile(path) as archive:
        assert archive.read("behind") == b"abc"
        assert archive.getinfo("large").file_size == LARGE
        with archive.open("large") as member:
            assert member.read(5) == bytes(5)


@pytest.mark.parametrize("is_zip64", [False, True])
def test_the_length_of_a_header_does_not_depend_on_size_or_checksum(is_zip64: bool) -> None:
    lengths = {
        len(encode_header(Member("name", size, crc, offset, is_zip64), MOMENT))
        for size, crc, offset in ((0, 0, 0), (1 << 30, 0xFFFFFFFF, 1 << 33))
    }
    assert len(lengths) == 1
