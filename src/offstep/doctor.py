"""What saving could cost on this machine: a few seconds of measuring, by the ways that a save takes itself."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from offstep import buffers, commit
from offstep.temporary_names import FILE_IN_PROGRESS_PREFIX

_PACKAGES = ("offstep", "keras", "jax", "jaxlib", "orbax-checkpoint", "tensorstore", "h5py", "numpy")
_BYTES = 64 << 20
_REPEATS = 3
_SLOTS = 2  # unless the user asks for others
_REMOTE = frozenset(("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "fuse.gcsfuse", "fuse.s3fs", "lustre", "ceph"))
_VOLATILE = frozenset(("tmpfs", "ramfs"))


@dataclass(frozen=True)
class Diagnosis:
    """What was measured; speeds in bytes per second, the median of three.

    Attributes:
        versions: Of the packages that take part.
        devices: JAX's devices, each as text.
        copy_speed: From memory to memory that was touched before: a snapshot on the CPU backend.
        fetch_speed: From the first device to the host; `None` where that is the CPU.
        write_speed: To the disk, made durable and renamed, as a checkpoint is.
        sync_seconds: For one page that is made durable: what every save takes at least.
        file_system: Type of the file system of the directory, `""` where it is unknown.
        free_bytes: Space that is left there.
        memory_bytes: Host memory that slots may take now.
        can_share: Whether a writer process can see the snapshots; else a thread writes.
        advice: Sentences.
    """

    versions: dict[str, str]
    devices: tuple[str, ...]
    copy_speed: float
    fetch_speed: float | None
    write_speed: float
    sync_seconds: float
    file_system: str
    free_bytes: int
    memory_bytes: int
    can_share: bool
    advice: tuple[str, ...]


def diagnose(directory: Path) -> Diagnosis:
    """Measures with 64 MB at a time, in a file that is deleted again.

    Raises:
        OSError: nothing can be saved in the directory.
    """
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "doctor needs a directory that exists", os.fspath(directory))
    commit.probe_directory(directory)
    devices, fetch_speed = _measure_devices()
    copy_speed, write_speed = _measure_copy(), _BYTES / _measure_write(directory, _BYTES)
    file_system = find_file_system(directory, Path("/proc/self/mounts").read_text())
    can_share = hasattr(os, "memfd_create")
    memory_bytes = buffers.default_budget_bytes()
    return Diagnosis(
        versions=_list_versions(),
        devices=devices,
        copy_speed=copy_speed,
        fetch_speed=fetch_speed,
        write_speed=write_speed,
        sync_seconds=_measure_write(directory, mmap.PAGESIZE),
        file_system=file_system,
        free_bytes=os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize,
        memory_bytes=memory_bytes,
        can_share=can_share,
        advice=tuple(_advise(fetch_speed or copy_speed, write_speed, memory_bytes, file_system, can_share)),
    )


def find_file_system(directory: Path, mounts: str) -> str:
    """Returns the type of the file system that a directory lies on, by the text of `/proc/self/mounts`."""
    path = os.fspath(directory.resolve())
    found, length = "", -1
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= length:
            found, length = kind, len(point)
    return found


def _advise(stage_speed: float, write_speed: float, memory_bytes: int, file_system: str, can_share: bool) -> list[str]:
    stall_ms, durable_ms = 1e12 / stage_speed, 1e12 / write_speed
    fitting_gb = memory_bytes / _SLOTS / 1e9
    advice = [
        f"A state of 1 GB would stall training for about {stall_ms:,.0f} ms, and be durable after about "
        f"{durable_ms:,.0f} ms: save no more often than that, or saves wait for each other.",
        f"The memory that is available holds {_SLOTS} snapshots of a state of up to {fitting_gb:,.1f} GB; of a larger "
        "one it holds fewer, and a save may wait for the one before.",
    ]
    if file_system in _VOLATILE:
        advice.append(f"This directory is {file_system}: it is memory, and nothing in it outlives a power cut.")
    if file_system in _REMOTE:
        advice.append(f"This directory is {file_system}: what durable means there is up to the server.")
    if not can_share:
        advice.append("This system has no memfd: a thread writes, and takes time from training.")
    return advice


def _measure_copy() -> float:
    source, target = np.ones(_BYTES, np.uint8), np.ones(_BYTES, np.uint8)
    return _BYTES / _time(lambda: np.copyto(target, source))


def _measure_devices() -> tuple[tuple[str, ...], float | None]:
    import jax  # a second; and only here

    devices = jax.devices()
    names = tuple(f"{device.platform}:{device.id} {device.device_kind}" for device in devices)
    if devices[0].platform == "cpu":
        return names, None
    arrays = [jax.device_put(np.full(_BYTES, number, np.uint8), devices[0]) for number in range(_REPEATS)]
    for array in arrays:
        array.block_until_ready()
    waiting = iter(arrays)  # JAX keeps what it has fetched: each one counts once
    return names, _BYTES / _time(lambda: np.asarray(next(waiting)))


def _measure_write(directory: Path, size_bytes: int) -> float:
    """Returns the seconds until a file of that size is durable."""
    target = directory / f"{FILE_IN_PROGRESS_PREFIX}doctor-{secrets.token_hex(4)}"
    with mmap.mmap(-1, size_bytes) as pages, memoryview(pages) as view:
        pages.write(os.urandom(mmap.PAGESIZE) * (size_bytes // mmap.PAGESIZE))

        def write() -> None:
            with commit.StagedFile(target, size_bytes=size_bytes) as staged:
                staged.write(view, 0, io_threads=2)
                staged.commit()

        try:
            return _time(write)
        finally:
            commit.remove_file(target)


def _time(act: Callable[[], object]) -> float:
    """Returns the median of three."""
    found = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        act()
        found.append(time.perf_counter() - started)
    return sorted(found)[_REPEATS // 2]


def _list_versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
