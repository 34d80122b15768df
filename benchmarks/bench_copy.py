"""How close does `gather`, with and without checksums, come to memcpy's bandwidth, and to NumPy and JAX?

Run as `PYTHONPATH=src python benchmarks/bench_copy.py`. The peers take turns; the slot is a warm memfd.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from offstep import _native

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
MEMCPY = ctypes.CDLL(None).memcpy
MEMCPY.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
MEMCPY.restype = ctypes.c_void_p


def make_slot(size: int, threads: int) -> np.ndarray:
    fd = os.memfd_create("offstep-bench")
    os.ftruncate(fd, size)
    slot = np.frombuffer(mmap.mmap(fd, size), dtype=np.uint8)
    os.close(fd)
    _native.prefault(slot, threads)
    slot[:] = 1
    return slot


def make_entries(leaves: list[np.ndarray], flags: int) -> np.ndarray:
    entries = np.zeros(len(leaves), dtype=ENTRY)
    entries["size"] = [leaf.nbytes for leaf in leaves]
    strides = (entries["size"] + 4 + 63) // 64 * 64
    entries["slot_offset"] = np.cumsum(strides) - strides
    entries["source"] = np.arange(len(leaves))
    entries["flags"] = flags
    return entries


def memcpy_split(source: np.ndarray, slot: np.ndarray, helpers: ThreadPoolExecutor, threads: int) -> None:
    """Copies one long range with libc's memcpy, each thread an equal share: the bound."""
    cuts = [source.nbytes * i // threads for i in range(threads + 1)]

    def copy(begin: int, end: int) -> None:
        MEMCPY(slot.ctypes.data + begin, source.ctypes.data + begin, end - begin)

    pending = [helpers.submit(copy, *cuts[i : i + 2]) for i in range(1, threads)]
    copy(*cuts[:2])
    for share in pending:
        share.result()


def make_peers(leaves: list[np.ndarray], slot: np.ndarray) -> dict[str, Callable[[], object]]:
    whole = np.concatenate(leaves)
    helpers = ThreadPoolExecutor(1)
    arrays = [jnp.asarray(leaf) for leaf in leaves]
    sources = [leaf.ctypes.data for leaf in leaves]
    plain, checked = make_entries(leaves, 0), make_entries(leaves, 1)
    targets = [slot[start:][: leaf.nbytes] for start, leaf in zip(plain["slot_offset"], leaves, strict=True)]
    peers: dict[str, Callable[[], object]] = {}
    for threads in (1, 2):
        peers[f"memcpy, {threads} threads"] = lambda t=threads: memcpy_split(whole, slot, helpers, t)
        peers[f"gather, {threads} threads"] = lambda t=threads: _native.gather(sources, plain, slot, t)
        peers[f"gather with CRC, {threads} threads"] = lambda t=threads: _native.gather(sources, checked, slot, t)
    peers["numpy.copyto"] = lambda: [np.copyto(*pair) for pair in zip(targets, leaves, strict=True)]
    peers["jnp.copy (fresh memory)"] = lambda: jax.block_until_ready([jnp.copy(array) for array in arrays])
    return peers


def measure(peers: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(repeats + 1):
        for name, peer in peers.items():
            start = time.perf_counter()
            peer()
            times[name].append(time.perf_counter() - start)
    return {name: taken[1:] for name, taken in times.items()}


def report(leaf_count: int, leaf_bytes: int, repeats: int) -> None:
    leaves = [np.full(leaf_bytes, i % 251, dtype=np.uint8) for i in range(leaf_count)]
    slot = make_slot(leaf_count * (leaf_bytes + 4 + 63), 2)
    total = leaf_count * leaf_bytes
    results = measure(make_peers(leaves, slot), repeats)
    bound = statistics.median(results["memcpy, 2 threads"])
    print(f"\n{leaf_count} leaves of {leaf_bytes} bytes, {total / 1e6:.1f} MB, {repeats} repeats")
    for name, taken in results.items():
        median = statistics.median(taken)
        print(
            f"  {name:30} {median * 1e3:9.3f} ms ({min(taken) * 1e3:.3f} to {max(taken) * 1e3:.3f})"
            f" {total / median / 1e9:6.2f} GB/s {median / bound:5.2f} x memcpy with 2 threads"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    print(f"{platform.platform()}, {os.cpu_count()} cores, {_native.cpu_features()}")
    print(f"python {platform.python_version()}, numpy {np.__version__}, jax {jax.__version__}")
    report(40, 15 << 20, repeats)
    report(1800, 8 << 10, repeats)
    report(10_000, 128, repeats)


if __name__ == "__main__":
    main()
