"""How fast could a save be on this machine: warm memory copy, and a direct write with fsync?"""

from __future__ import annotations

import itertools
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

WRITE_BYTES = 8 << 20
ALIGNMENT = 4096
EVICT_BYTES = 512 << 20
# Of `offstep._native.gather`.
_ENTRY = np.dtype("<u8,<u8,<u8,<u8,<u4,<u4")
_POOL = ThreadPoolExecutor(2)


def measure_copy_seconds(state_bytes: int, repeats: int = 9, *, cold: bool = False) -> dict[str, float]:
    """Returns the time to copy `state_bytes` into touched memory, by method: NumPy or native, with 1 or 2 threads.

    Repeated at once, a copy finds in the caches what fits there: no save can beat that. With `cold` the caches are
    filled with other bytes before each copy.
    """
    source = np.ones(state_bytes, np.uint8)
    target = np.zeros(state_bytes, np.uint8)
    other = np.zeros(EVICT_BYTES if cold else 1, np.uint8)
    native = _native_copy()
    copies = {"numpy": _copy_split, **({"native": native} if native else {})}
    return {
        f"{name}, {threads} threads": _fastest(partial(copy, source, target, threads), repeats, partial(other.fill, 1))
        for name, copy in copies.items()
        for threads in (1, 2)
    }


def _copy_split(source: np.ndarray, target: np.ndarray, threads: int) -> None:
    edges = [len(source) * i // threads for i in range(threads + 1)]
    parts = [slice(*edge) for edge in itertools.pairwise(edges)]
    list(_POOL.map(lambda part: np.copyto(target[part], source[part]), parts))


def _native_copy() -> Callable[[np.ndarray, np.ndarray, int], None] | None:
    """Returns offstep's own copy without checksums, where its C module is built."""
    try:
        from offstep import _native
    except ImportError:
        return None

    def copy(source: np.ndarray, target: np.ndarray, threads: int) -> None:
        entry = np.array([(0, 0, len(source), 0, 0, 0)], _ENTRY)
        _native.gather([source.ctypes.data], entry, target, threads)

    return copy


def _fastest(action: Callable[[], object], repeats: int, prepare: Callable[[], object]) -> float:
    """Returns the shortest time: disturbances only ever make a bound easier to reach."""
    action()  # Touches everything once.
    seconds = []
    for _ in range(repeats):
        prepare()
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure_write_seconds(state_bytes: int, directory: Path, repeats: int = 3) -> dict[str, float]:
    """Returns the time to write `state_bytes` to a new file and fsync it, by method: 1 or 2 writes in flight."""
    return {
        f"direct, {writers} in flight": min(write_once(state_bytes, directory, writers) for _ in range(repeats))
        for writers in (1, 2)
    }


def write_once(state_bytes: int, directory: Path, writers: int) -> float:
    """Returns the seconds to write that many bytes to a new file and fsync it, with as many writes in flight."""
    path = directory / "bound.bin"
    total = -(-state_bytes // ALIGNMENT) * ALIGNMENT
    with mmap.mmap(-1, WRITE_BYTES) as buffer, ThreadPoolExecutor(writers) as pool:
        buffer.write(os.urandom(1 << 20) * (WRITE_BYTES >> 20))
        view = memoryview(buffer)
        start = time.perf_counter()
        descriptor = _open_direct(path)
        try:
            offsets = range(0, total, WRITE_BYTES)
            list(pool.map(lambda at: os.pwrite(descriptor, view[: min(WRITE_BYTES, total - at)], at), offsets))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        seconds = time.perf_counter() - start
        view.release()
    path.unlink()
    return seconds


def _open_direct(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError:  # The file system refuses direct I/O: the bound is the buffered write.
        path.unlink(missing_ok=True)
        return os.open(path, flags, 0o644)


def measure_bounds(state_bytes: int, directory: Path) -> dict[str, dict[str, float]]:
    """Returns the seconds of all bounds for a state of `state_bytes`, by method; the fastest method is the bound."""
    return {
        "copy_seconds": measure_copy_seconds(state_bytes),
        "cold_copy_seconds": measure_copy_seconds(state_bytes, 3, cold=True),
        "write_seconds": measure_write_seconds(state_bytes, directory),
    }
