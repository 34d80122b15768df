"""Which training processes hold which shards of an array."""

from __future__ import annotations

import itertools
import os
from functools import lru_cache
from typing import Any

import jax

from offstep.coordination import PRIMARY
from offstep.sharding import sharding_text

Array = Any  # jax.Array, np.ndarray or a Python number


def spans_processes(array: Array) -> bool:
    """Returns whether a part of the array is out of this process's reach."""
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def own_path(filepath: str) -> str:
    """Returns where this process saves on a disk of its own: in `process_<i>`, below which steps are.

    Args:
        filepath: Directory of steps, or a path that ends in `{step}`.

    Raises:
        ValueError: it is no path of a file system.
    """
    if "://" in filepath:
        raise ValueError(f"layout='local' is for disks, of which each host has one. Received: {filepath}")
    if jax.process_count() == 1:
        return filepath
    own = f"process_{jax.process_index()}"
    parent, last = os.path.split(filepath)
    return os.path.join(parent, own, last) if last == "{step}" else os.path.join(filepath, own)


def find_home() -> str | None:
    """Returns the text for a sharding on this process's first device.

    Stock readers take the devices that a checkpoint names where they are not told any. Those of several processes do
    not exist in one, nor with another number of processes, so that stock `load_model` would fail.
    """
    return sharding_text(jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))


def list_holders(array: Array) -> tuple[tuple[int, ...], ...]:
    """Returns for each shard, in C order over the shard grid, the processes that hold it.

    What is in reach of this process as a whole, each process has for itself: the primary's counts.
    """
    if not isinstance(array, jax.Array):
        return ((PRIMARY,),)
    found = _find_holders(array.sharding, array.shape)
    return found if spans_processes(array) else ((PRIMARY,),) * len(found)


@lru_cache(maxsize=4096)  # thousands of leaves have a handful of shapes
def _find_holders(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    part = sharding.shard_shape(shape)
    found: dict[tuple[int, ...], set[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        start = tuple((piece.start or 0) // size if size else 0 for piece, size in zip(index or (), part, strict=True))
        found.setdefault(start, set()).add(device.process_index)  # type: ignore[attr-defined]  # mypy sees no devices
    grid = (range(whole // size if size else 1) for whole, size in zip(shape, part, strict=True))
    return tuple(tuple(sorted(found[start])) for start in itertools.product(*grid))
