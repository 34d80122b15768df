"""Where was it measured, and where do the results of today go?"""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import os
import platform
import re
from pathlib import Path
from typing import Any

import psutil

VERSIONS = ("offstep", "keras", "jax", "jaxlib", "orbax-checkpoint", "tensorstore", "numpy", "safetensors", "torch")


def describe_machine(directory: Path) -> dict[str, Any]:
    """Returns CPU, cores, memory, kernel, file system and versions, for JSON."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "name": platform.node(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": f"{platform.system()} {platform.release()}",
        "file_system": _file_system(directory),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_model() -> str:
    match = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.processor() or platform.machine()


def _file_system(directory: Path) -> str:
    path = directory.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    best = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    return f"{best.fstype} ({best.mountpoint})" if best else "unknown"


def today() -> str:
    """Returns the date in UTC."""
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def free_path(directory: Path, name: str) -> Path:
    """Returns where results of today go: `<date>-<name>.json`, numbered where that exists."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = f"{today()}-{name}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(path for free in names if not (path := directory / f"{free}.json").exists())
