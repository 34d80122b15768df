"""Tells what an array of a state is: its leaf, and in what memory it lies."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from offstep.errors import UnsupportedLeaf
from offstep.records import Leaf, PathKey
from offstep.sharding import sharding_text

Array = Any  # jax.Array, np.ndarray or a Python number


def describe_leaf(path: tuple[PathKey, ...], array: Array) -> Leaf:
    """Returns the record of one array of the state.

    Raises:
        UnsupportedLeaf: it is not an array of numbers.
    """
    if isinstance(array, jax.core.Tracer):
        raise UnsupportedLeaf(f"{'.'.join(map(str, path))}: it is being traced; save outside of jitted functions.")
    if not isinstance(array, jax.Array):
        return _describe_host_leaf(path, array)
    prng_impl = None
    if is_key(array):
        prng_impl = str(jax.random.key_impl(array))
        array = jax.random.key_data(array)
    return Leaf(
        path=path,
        shape=array.shape,
        dtype=array.dtype.name,
        shard_shape=tuple(array.sharding.shard_shape(array.shape)),
        sharding=sharding_text(array.sharding),
        prng_impl=prng_impl,
    )


def _describe_host_leaf(path: tuple[PathKey, ...], value: Array) -> Leaf:
    host = np.asarray(value)
    name = ".".join(map(str, path))
    if host.dtype.kind not in "biufcV" or host.dtype.names is not None:
        raise UnsupportedLeaf(f"{name}: a checkpoint holds arrays of numbers. Received: {type(value).__name__}")
    kind = "np.ndarray" if isinstance(value, np.ndarray) else "scalar"
    return Leaf(path=path, shape=host.shape, dtype=host.dtype.name, value_type=kind, shard_shape=host.shape)


def can_be_pointed_at(array: Array) -> bool:
    """Returns whether the array's shards are plain row-major memory of this host."""
    if not isinstance(array, jax.Array) or is_key(array):
        return False
    return platform(array) == "cpu" and _bits(array.dtype) == array.dtype.itemsize * 8 and _is_row_major(array)


def platform(array: jax.Array) -> str:
    """Returns what kind of devices the array is on."""
    device: Any = next(iter(array.sharding.device_set))  # jax.Device, of which mypy sees nothing
    return str(device.platform)


def is_key(array: jax.Array) -> bool:
    """Returns whether it is an array of random keys, whose numbers JAX hides."""
    return bool(jnp.issubdtype(array.dtype, jax.dtypes.prng_key))


def _bits(dtype: np.dtype) -> int:
    """Returns the bits of one element on the device, where types below a byte may be packed."""
    if jnp.issubdtype(dtype, jnp.integer):
        return int(jnp.iinfo(dtype).bits)  # type: ignore[no-untyped-call]
    if jnp.issubdtype(dtype, jnp.floating):
        return int(jnp.finfo(dtype).bits)  # type: ignore[no-untyped-call]
    return dtype.itemsize * 8


def _is_row_major(array: jax.Array) -> bool:
    layout = getattr(getattr(array, "format", None), "layout", None)
    order = getattr(layout, "major_to_minor", None)
    return order is None or tuple(order) == tuple(range(array.ndim))
