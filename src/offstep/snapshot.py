"""Brings the state from device memory into a slot: the only module that reads device buffers.

Two ways. `"host"` (CPU devices): the arrays' own buffers are copied into the slot before the call returns.
`"device_copy"` (GPU, TPU): a copy of all arrays is dispatched on the device, and fetched into the slot later by
another thread, while training goes on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from offstep import _native
from offstep.buffers import Slot, copy_table, shard_count, shard_grid
from offstep.errors import StructureMismatch, UnsupportedLeaf
from offstep.options import Mode
from offstep.records import Leaf, PathKey, Plan
from offstep.sharding import sharding_text

Array = Any  # jax.Array, np.ndarray or a Python number

_SINGLE_SHARD = (0,)


# ------------------------------------------------------------------------------------------------ what is there


def describe_leaf(path: tuple[PathKey, ...], array: Array) -> Leaf:
    """Returns the record of one array of the state.

    Raises:
        UnsupportedLeaf: it is not an array of numbers, or not all of it can be reached from this process.
    """
    if isinstance(array, jax.core.Tracer):
        raise UnsupportedLeaf(f"{'.'.join(map(str, path))}: it is being traced; save outside of jitted functions.")
    if not isinstance(array, jax.Array):
        return _describe_host_leaf(path, array)
    prng_impl = None
    if _is_key(array):
        prng_impl = str(jax.random.key_impl(array))
        array = jax.random.key_data(array)
    return Leaf(
        path=path,
        shape=array.shape,
        dtype=array.dtype.name,
        shard_shape=_shard_shape(path, array),
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


def _shard_shape(path: tuple[PathKey, ...], array: jax.Array) -> tuple[int, ...]:
    if not array.is_fully_addressable:
        name = ".".join(map(str, path))
        raise UnsupportedLeaf(f"{name}: it is spread over several processes, which this version cannot save.")
    return tuple(array.sharding.shard_shape(array.shape))


# ---------------------------------------------------------------------------------------------------- taking it


class Snapshotter:
    """Copies states of one structure into slots.

    Args:
        plan: Where each leaf goes.
        arrays: A state of that structure, in the order of the plan's leaves; it is not kept.
        mode: How to read the arrays; `None` chooses by the devices they are on.
        threads: Threads that copy.
    """

    def __init__(self, plan: Plan, arrays: Sequence[Array], *, mode: Mode | None = None, threads: int = 2) -> None:
        self.plan = plan
        self.mode = mode or choose_mode(arrays)
        self._threads = threads
        self._table = copy_table(plan)
        self._shapes = [_shape(array) for array in arrays]
        self._dtypes = [_dtype(array) for array in arrays]
        self._shardings = [getattr(array, "sharding", None) for array in arrays]
        self._shards = [_distinct_shards(layout.leaf, array) for layout, array in zip(plan.leaves, arrays, strict=True)]
        self._has_pointers = [_can_be_pointed_at(array) for array in arrays]
        self._device_copies = [
            (indices, jax.jit(_copy_all, out_shardings=[self._shardings[index] for index in indices]))
            for indices in _group_by_devices(arrays)
        ]
        self._host_dtypes = [_native_dtype(layout.leaf) for layout in plan.leaves]
        self._is_plain = all(self._has_pointers) and all(shards is _SINGLE_SHARD for shards in self._shards)

    def matches(self, arrays: Sequence[Array]) -> bool:
        """Returns whether the arrays still have the structure that the plan was made for. About 0.3 us a leaf."""
        return (
            len(arrays) == len(self._shapes)
            and [_shape(array) for array in arrays] == self._shapes
            and [_dtype(array) for array in arrays] == self._dtypes
            and [getattr(array, "sharding", None) for array in arrays] == self._shardings
        )

    def wait_until_computed(self, arrays: Sequence[Array]) -> None:
        """Waits for the training steps that were dispatched, which make the arrays.

        Raises:
            StructureMismatch: an array has been deleted.
        """
        try:
            jax.block_until_ready(list(arrays))  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            raise _unreadable(error) from error

    def take(self, arrays: Sequence[Array], slot: Slot) -> None:
        """Copies the arrays into the slot, chunk by chunk, each with its checksum.

        Waits until the arrays are computed. No reference to their memory is left when it returns. The arrays must
        satisfy `matches` and must not be donated meanwhile: call it on the thread that runs the training steps.

        Raises:
            StructureMismatch: an array has been deleted or resharded.
        """
        keep_alive: list[np.ndarray] = []
        self.wait_until_computed(arrays)
        try:
            addresses = self._addresses(arrays, keep_alive)
        except (RuntimeError, ValueError) as error:
            raise _unreadable(error) from error
        _native.gather(addresses, self._table.data, slot.buffer, self._threads)

    def copy_on_device(self, arrays: Sequence[Array]) -> list[Array]:
        """Dispatches a copy of the arrays on their devices and returns it, without waiting.

        Raises:
            StructureMismatch: an array has been deleted.
        """
        copies: list[Array] = [
            None if isinstance(array, jax.Array) else np.array(array, dtype)
            for array, dtype in zip(arrays, self._host_dtypes, strict=True)
        ]
        for indices, copy_group in self._device_copies:
            try:
                copied = copy_group([arrays[index] for index in indices])
            except (RuntimeError, ValueError) as error:
                raise _unreadable(error) from error
            for index, copy in zip(indices, copied, strict=True):
                copies[index] = copy
        return copies

    def fetch(self, private: list[Array], slot: Slot) -> None:
        """Moves arrays that nobody else uses into the slot, leaf by leaf, and empties the list on the way.

        Any thread. Waits for the device.
        """
        sources = self._table["source"]
        first_source = 0
        for index, layout in enumerate(self.plan.leaves):
            count = shard_count(layout.leaf)
            rows = slice(*np.searchsorted(sources, (first_source, first_source + count)))
            table = self._table[rows].copy()
            table["source"] -= first_source
            hosts = [_to_host(shard, self._host_dtypes[index]) for shard in self._shards_of(index, private[index])]
            private[index] = None  # its device memory is free from here on
            _native.gather([_address(host) for host in hosts], table.data, slot.buffer, self._threads)
            first_source += count

    def _addresses(self, arrays: Sequence[Array], keep_alive: list[np.ndarray]) -> list[int]:
        if self._is_plain:
            return [array.unsafe_buffer_pointer() for array in arrays]
        addresses = []
        for index, array in enumerate(arrays):
            for shard in self._shards_of(index, array):
                if self._has_pointers[index]:
                    addresses.append(shard.unsafe_buffer_pointer())
                else:
                    keep_alive.append(_to_host(shard, self._host_dtypes[index]))
                    addresses.append(_address(keep_alive[-1]))
        return addresses

    def _shards_of(self, index: int, array: Array) -> list[Array]:
        shards = self._shards[index]
        if shards is _SINGLE_SHARD:
            return [array]
        return [array.addressable_data(number) for number in shards]


def choose_mode(arrays: Sequence[Array]) -> Mode:
    """Returns how to read arrays on such devices."""
    platforms = {_platform(array) for array in arrays if isinstance(array, jax.Array)}
    return "host" if platforms <= {"cpu"} else "device_copy"


def _copy_all(arrays: list[Array]) -> list[Array]:
    # A plain identity would be forwarded by jit, without a copy.
    return [jnp.copy(array) for array in arrays]


def _shape(array: Array) -> tuple[int, ...]:
    return array.shape if hasattr(array, "shape") else ()


def _dtype(array: Array) -> object:
    return array.dtype if hasattr(array, "dtype") else type(array)


def _group_by_devices(arrays: Sequence[Array]) -> list[list[int]]:
    """Returns the indices of the JAX arrays, those on the same devices together: one jitted call takes no others.

    It also wants the devices in one order, and meshes may differ in theirs.
    """
    groups: dict[object, list[int]] = {}
    for index, array in enumerate(arrays):
        if isinstance(array, jax.Array):
            groups.setdefault(_devices_in_order(array.sharding), []).append(index)
    return list(groups.values())


def _devices_in_order(sharding: jax.sharding.Sharding) -> object:
    if isinstance(sharding, jax.sharding.NamedSharding):
        return tuple(sharding.mesh.devices.flat)
    return frozenset(sharding.device_set)


def _can_be_pointed_at(array: Array) -> bool:
    """Returns whether the array's shards are plain row-major memory of this host."""
    if not isinstance(array, jax.Array) or _is_key(array):
        return False
    return _platform(array) == "cpu" and _bits(array.dtype) == array.dtype.itemsize * 8 and _is_row_major(array)


def _platform(array: jax.Array) -> str:
    device: Any = next(iter(array.sharding.device_set))  # jax.Device, of which mypy sees nothing
    return str(device.platform)


def _is_key(array: jax.Array) -> bool:
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


def _distinct_shards(leaf: Leaf, array: Array) -> tuple[int, ...]:
    """Returns which of the addressable shards to read: one replica of each, in C order over the shard grid."""
    if not isinstance(array, jax.Array) or len(array.sharding.device_set) == 1:
        return _SINGLE_SHARD
    if leaf.prng_impl is not None:
        array = jax.random.key_data(array)
    part = leaf.shard_shape
    found: dict[tuple[int, ...], int] = {}
    for number, shard in enumerate(array.addressable_shards):
        start = tuple((piece.start or 0) // size if size else 0 for piece, size in zip(shard.index, part, strict=True))
        found.setdefault(start, number)
    return tuple(found[start] for start in itertools.product(*(range(count) for count in shard_grid(leaf))))


def _native_dtype(leaf: Leaf) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, leaf.dtype, leaf.dtype))


def _to_host(array: Array, dtype: np.dtype) -> np.ndarray:
    """Returns the array in plain memory of this host, in its byte order; a Python number must fit `dtype`."""
    if isinstance(array, jax.Array) and _is_key(array):
        array = jax.random.key_data(array)
    return np.asarray(array, dtype, order="C")


def _unreadable(error: Exception) -> StructureMismatch:
    return StructureMismatch(f"the state cannot be read ({error}); was an array of it donated?")


def _address(host: np.ndarray) -> int:
    address: int = host.__array_interface__["data"][0]
    return address
