"""The C module against models written in NumPy and plain Python."""

from __future__ import annotations

import errno
import mmap
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offstep import _native

Bytes = npt.NDArray[np.uint8]

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
GUARD = 0xEE
NOISE = np.random.default_rng(0).integers(0, 256, 6 << 20, dtype=np.uint8)


def reference_crc32c(data: bytes, crc: int = 0) -> int:
    """Bit by bit, as RFC 3720 describes it."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def make_entries(*rows: tuple[int, int, int, int, int, int]) -> npt.NDArray[np.void]:
    return np.array(list(rows), dtype=ENTRY)


def address_of(array: Bytes) -> int:
    return int(array.ctypes.data)


def expected_slot(sources: list[Bytes], entries: npt.NDArray[np.void], slot_bytes: int) -> Bytes:
    slot = np.full(slot_bytes, GUARD, np.uint8)
    for entry in entries:
        start, size, pad = int(entry["slot_offset"]), int(entry["size"]), int(entry["pad"])
        source = sources[entry["source"]][int(entry["source_offset"]) :]
        slot[start : start + size] = source[:size]
        slot[start + size : start + size + pad] = 0
        end = start + size + pad
        if entry["flags"]:
            checksum = _native.crc32c(slot[start:end])  # itself checked against the reference below
            slot[end : end + 4] = np.frombuffer(checksum.to_bytes(4, "little"), np.uint8)
    return slot


sizes = st.one_of(st.integers(0, 300), st.integers(0, 100_000), st.integers(0, 5 << 20))
pads = st.one_of(st.just(0), st.integers(0, 5000), st.integers(0, 3 << 20))


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[Bytes], npt.NDArray[np.void], int]:
    source_count = draw(st.integers(1, 4))
    sources = [NOISE[draw(st.integers(0, 1000)) :] for _ in range(source_count)]
    rows = []
    end = 0
    for _ in range(draw(st.integers(0, 12))):
        size, pad = draw(sizes), draw(pads)
        start = end + draw(st.integers(0, 200))
        source_offset = draw(st.integers(0, 1000))
        rows.append((source_offset, start, size, pad, draw(st.integers(0, source_count - 1)), draw(st.integers(0, 1))))
        end = start + size + pad + 4
    return sources, make_entries(*rows), end + draw(st.integers(0, 100))


@settings(max_examples=60, deadline=None)
@given(job=jobs(), threads=st.integers(1, 4))
def test_gather_does_what_the_entries_say(job: tuple[list[Bytes], npt.NDArray[np.void], int], threads: int) -> None:
    sources, entries, slot_bytes = job
    slot = np.full(slot_bytes, GUARD, np.uint8)

    _native.gather([address_of(source) for source in sources], entries, slot, threads)

    assert np.array_equal(slot, expected_slot(sources, entries, slot_bytes))


def test_gather_handles_ten_thousand_small_entries() -> None:
    count = 10_000
    sources = [NOISE[i * 37 : i * 37 + 200] for i in range(count)]
    entries = np.zeros(count, ENTRY)
    entries["source"] = np.arange(count)
    entries["size"] = np.arange(count) % 197
    entries["pad"] = np.arange(count) % 3
    entries["flags"] = np.arange(count) % 2
    entries["slot_offset"] = np.arange(count) * 256
    slot = np.full(count * 256, GUARD, np.uint8)

    _native.gather([address_of(source) for source in sources], entries, slot, 4)

    assert np.array_equal(slot, expected_slot(sources, entries, len(slot)))


def test_gather_takes_numpy_addresses_and_packed_bytes() -> None:
    slot = bytearray(20)
    addresses = np.array([address_of(NOISE)], np.uint64)

    entries = make_entries((1, 2, 10, 0, 0, 0)).tobytes()
    _native.gather(sources=addresses, entries=entries, slot=slot, threads=1)  # type: ignore[arg-type]

    assert bytes(slot[2:12]) == NOISE[1:11].tobytes()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((0, 0, 101, 0, 0, 0), "expected an end within the slot's 100 bytes, found offset 0 + size 101"),
        ((0, 60, 40, 0, 0, 1), "checksum 4"),
        ((0, 60, 40, 1, 0, 0), "pad 1"),
        ((0, 2**64 - 1, 2, 0, 0, 0), "offset 18446744073709551615"),
        ((0, 50, 2**64 - 10, 0, 0, 0), "size 18446744073709551606"),
        ((0, 50, 10, 2**64 - 10, 0, 0), "pad 18446744073709551606"),
        ((0, 0, 1, 0, 2, 0), "expected a source below 1, found 2"),
        ((2**64 - 1, 0, 1, 0, 0, 0), "expected a readable source 0"),
        ((0, 0, 1, 0, 0, 3), "expected flags 0 or 1, found 3"),
    ],
)
def test_bad_entry_is_named_and_leaves_the_slot_untouched(
    row: tuple[int, int, int, int, int, int], message: str
) -> None:
    slot = np.full(100, GUARD, np.uint8)
    entries = make_entries((0, 0, 50, 0, 0, 1), row)

    with pytest.raises(ValueError, match=rf"^entry 1: .*{re.escape(message)}"):
        _native.gather([address_of(NOISE)], entries, slot, 2)

    assert (slot == GUARD).all()


def test_missing_source_address_is_refused() -> None:
    with pytest.raises(ValueError, match="entry 0: expected a readable source 0, found address 0"):
        _native.gather([0], make_entries((0, 0, 1, 0, 0, 0)), bytearray(10), 1)


def test_arguments_of_the_wrong_kind_are_refused() -> None:
    entries = make_entries((0, 0, 1, 0, 0, 0))
    with pytest.raises(ValueError, match="entries: expected a multiple of 40 bytes, found 39"):
        _native.gather([1], entries.tobytes()[:-1], bytearray(10), 1)
    with pytest.raises(ValueError, match="threads: expected 1 to 256, found 0"):
        _native.gather([1], entries, bytearray(10), 0)
    with pytest.raises(TypeError, match="read-write"):
        _native.gather([1], entries, b"constant", 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _native.gather(["1"], entries, bytearray(10), 1)  # type: ignore[list-item]
    with pytest.raises(OverflowError):
        _native.gather([-1], entries, bytearray(10), 1)


def gather_and_compare(seed: int, times: int) -> bool:
    size = (2 << 20) + seed * 1001
    entries = make_entries((seed, 0, size, 7, 0, 1), (0, size + 11, 1000, 0, 0, 1))
    expected = expected_slot([NOISE], entries, size + 2000)
    for _ in range(times):
        slot = np.full(size + 2000, GUARD, np.uint8)
        _native.gather([address_of(NOISE)], entries, slot, 3)
        if not np.array_equal(slot, expected):
            return False
    return True


def test_concurrent_gathers_are_both_correct() -> None:
    good: list[bool] = []
    threads = [
        threading.Thread(target=lambda seed=seed: good.append(gather_and_compare(seed, 10))) for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert good == [True] * 4


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork.*:RuntimeWarning")
def test_gather_works_in_a_forked_child_and_still_in_the_parent() -> None:
    assert gather_and_compare(1, 2)
    child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(0 if gather_and_compare(2, 2) else 1))
    child.start()
    child.join(60)

    assert child.exitcode == 0
    assert gather_and_compare(3, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_helper_threads_are_named_and_reused() -> None:
    for _ in range(5):
        gather_and_compare(1, 1)
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]

    assert 2 <= names.count("offstep-copy") <= 3


@pytest.mark.parametrize(
    ("data", "checksum"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_crc32c_gives_the_published_values(data: bytes, checksum: int) -> None:
    assert _native.crc32c(data) == checksum


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 1000), size=st.integers(0, 9000), cut=st.integers(0, 9000), crc=st.integers(0, 2**32 - 1))
def test_crc32c_agrees_with_the_reference_and_continues(start: int, size: int, cut: int, crc: int) -> None:
    data = NOISE[start : start + size].tobytes()

    assert _native.crc32c(data, crc) == reference_crc32c(data, crc)
    assert _native.crc32c(data[cut:], crc=_native.crc32c(data[:cut], crc)) == reference_crc32c(data, crc)


def test_crc32c_of_a_gathered_chunk_agrees_with_the_reference() -> None:
    size = 300_001
    slot = bytearray(size + 1004)
    _native.gather([address_of(NOISE)], make_entries((3, 0, size, 1000, 0, 1)), slot, 2)

    assert int.from_bytes(slot[-4:], "little") == reference_crc32c(NOISE[3 : 3 + size].tobytes() + bytes(1000))


@pytest.mark.parametrize("crc", [-1, 2**32, 2**70])
def test_crc32c_refuses_a_start_beyond_32_bits(crc: int) -> None:
    with pytest.raises(OverflowError):
        _native.crc32c(b"", crc)


@pytest.mark.parametrize("threads", [1, 3])
def test_prefault_keeps_contents(threads: int) -> None:
    slot = mmap.mmap(-1, 50 << 20)
    slot[5000:5010] = b"0123456789"
    slot[-1:] = b"z"

    _native.prefault(slot, threads)
    _native.prefault(memoryview(slot)[4999:9001], threads)
    _native.prefault(bytearray(), threads)

    assert slot[5000:5010] == b"0123456789"
    assert slot[-1:] == b"z"
    assert slot[:5000].count(0) == 5000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_prefault_makes_a_memfd_resident() -> None:
    size = 32 << 20
    fd = os.memfd_create("offstep-test")
    os.ftruncate(fd, size)
    with mmap.mmap(fd, size) as slot:
        _native.prefault(slot, 2)

    assert os.fstat(fd).st_blocks * 512 >= size
    os.close(fd)


@pytest.mark.parametrize(("block_bytes", "threads"), [(1 << 30, 1), (65536, 4), (70_001, 3)])
def test_write_at_puts_every_block_in_its_place(tmp_path: Path, block_bytes: int, threads: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"head")
    with path.open("r+b", buffering=0) as file:
        _native.write_at(file.fileno(), NOISE, 4, block_bytes, threads)

    assert path.read_bytes() == b"head" + NOISE.tobytes()


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT here")
def test_write_at_writes_aligned_buffers_directly() -> None:
    slot = mmap.mmap(-1, 4 << 20)
    slot[:] = NOISE[: 4 << 20].tobytes()
    path = Path(__file__).with_name(f"direct-{os.getpid()}.tmp")  # not tmp_path: a tmpfs may refuse O_DIRECT
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    except OSError as error:
        pytest.skip(f"no O_DIRECT on the file system of {path}: {error}")
    try:
        _native.write_at(fd, slot, 8192, 1 << 20, 2)
        with pytest.raises(OSError, match="Invalid argument"):
            _native.write_at(fd, memoryview(slot)[1:4097], 0, 4096, 1)
        assert path.read_bytes() == bytes(8192) + slot[:]
    finally:
        os.close(fd)
        path.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("only root may mount the small file system that this test fills")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_write_at_reports_a_full_disk(small_disk: Path) -> None:
    with (small_disk / "file").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space") as caught:
        _native.write_at(file.fileno(), NOISE, 0, 256 << 10, 2)

    assert caught.value.errno == errno.ENOSPC


def test_write_at_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb", buffering=0) as file:
        fd = file.fileno()
        with pytest.raises(ValueError, match="offset: expected 0 to 9223372036854775806, found -1"):
            _native.write_at(fd, b"x", -1, 1, 1)
        with pytest.raises(ValueError, match="block_bytes: expected at least 1, found 0"):
            _native.write_at(fd, b"x", 0, 0, 1)
        with pytest.raises(ValueError, match="threads: expected 1 to 256, found 257"):
            _native.write_at(fd, b"x", 0, 1, 257)
    with pytest.raises(OSError, match="Bad file descriptor"):
        _native.write_at(-1, b"x", 0, 1, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_rename_exchange_swaps_a_directory_and_a_file(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "inside").write_text("kept")
    second.write_text("file")

    _native.rename_exchange(first, os.fsencode(second))

    assert first.read_text() == "file"
    assert (second / "inside").read_text() == "kept"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_rename_exchange_swaps_names_in_an_open_directory(tmp_path: Path) -> None:
    (tmp_path / "first").write_text("1")
    (tmp_path / "second").write_text("2")
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        _native.rename_exchange("first", "second", directory)
    finally:
        os.close(directory)
    assert [(tmp_path / name).read_text() for name in ("first", "second")] == ["2", "1"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_rename_exchange_names_the_paths_when_it_fails(tmp_path: Path) -> None:
    present, missing = tmp_path / "present", tmp_path / "missing"
    present.touch()

    with pytest.raises(FileNotFoundError, match=r"present.*missing"):
        _native.rename_exchange(str(present), str(missing))
    with pytest.raises(ValueError, match="null"):
        _native.rename_exchange("a\0b", "c")


RANGE = np.dtype([("offset", "<u8"), ("size", "<u8"), ("kind", "<u4"), ("reserved", "<u4")])


@pytest.mark.parametrize(("kind", "dtype"), list(enumerate(["float16", "bfloat16", "float32", "float64"])))
def test_nan_and_infinity_are_counted_in_every_kind(kind: int, dtype: str) -> None:
    random = np.random.default_rng(kind)
    values = random.normal(size=70_001).astype(getattr(ml_dtypes, dtype, dtype))
    places = random.choice(len(values), 3000, replace=False)
    values[places] = random.choice([np.nan, -np.nan, np.inf, -np.inf], len(places)).astype(values.dtype)
    data = b"x" + values.tobytes()
    ranges = np.array([(1, values.nbytes, kind, 0), (1, 0, kind, 0)], RANGE)
    assert _native.count_nonfinite(data, ranges.data) == len(places)


def test_ranges_to_count_in_are_checked() -> None:
    for bad in [(0, 9, 2, 0), (8, 8, 2, 0), (0, 8, 4, 0), (0, 8, 2, 1), (2**64 - 1, 4, 2, 0)]:
        with pytest.raises(ValueError, match="range 1: expected"):
            _native.count_nonfinite(bytes(12), np.array([(0, 8, 3, 0), bad], RANGE).data)
    with pytest.raises(ValueError, match="expected a multiple of 24 bytes, found 5"):
        _native.count_nonfinite(bytes(12), b"12345")


def test_cpu_features_are_words() -> None:
    assert re.fullmatch(r"[a-z0-9.-]*( [a-z0-9.-]+)*", _native.cpu_features())


# ------------------------------------------------------------------------------------------------------------- claim


def test_a_number_is_claimed_once() -> None:
    cell = mmap.mmap(-1, mmap.PAGESIZE)
    struct.pack_into("=Q", cell, 0, 7)
    assert not _native.claim(cell, 8)
    assert _native.claim(cell, 7)
    assert not _native.claim(cell, 7)
    assert bytes(cell[:8]) == bytes(8)


@pytest.mark.parametrize("cell", [bytearray(7), memoryview(bytearray(17))[1:]], ids=["small", "not aligned"])
def test_a_cell_that_cannot_be_claimed_in_is_refused(cell: bytearray | memoryview) -> None:
    with pytest.raises(ValueError, match="cell: expected 8 aligned bytes or more, found"):
        _native.claim(cell, 1)


def test_of_two_processes_one_claims_each_number() -> None:
    """The parent takes turns with a child that has no other way to know who was first."""
    numbers = 20_000
    code = "import mmap, struct, sys; from offstep import _native; cell = mmap.mmap(int(sys.argv[1]), 4096)\n"
    code += "taken = 0\nwhile (number := struct.unpack_from('=Q', cell, 8)[0]) < int(sys.argv[2]):\n"
    code += "    taken += number and _native.claim(cell, number)\nprint(taken)"
    descriptor = os.memfd_create("offstep-claim-test")
    try:
        os.ftruncate(descriptor, mmap.PAGESIZE)
        cell = mmap.mmap(descriptor, mmap.PAGESIZE)
        arguments = [sys.executable, "-c", code, str(descriptor), str(numbers)]
        child = subprocess.Popen(arguments, pass_fds=[descriptor], stdout=subprocess.PIPE, text=True)
        taken = 0
        for number in range(1, numbers):
            struct.pack_into("=Q", cell, 0, number)
            struct.pack_into("=Q", cell, 8, number)
            taken += _native.claim(cell, number)
        struct.pack_into("=Q", cell, 8, numbers)
        out, _ = child.communicate(timeout=60)
        assert taken + int(out) == numbers - 1
    finally:
        os.close(descriptor)
