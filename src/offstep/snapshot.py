"""Brings the state from device memory into a slot: the only module that reads device buffers.

Three ways. `"host"` (CPU devices): the arrays' own buffers are copied into the slot before the call returns.
`"device_copy"` (GPU, TPU): a copy of all arrays is dispatched on the device, and fetched into the slot later by
another thread, while training goes on. `"transfer"` (GPU, TPU without room for that copy): the arrays themselves are
transferred before the call returns, several at a time.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from offstep import _native
from offstep.arrays import Array, can_be_pointed_at, is_key, platform
from offstep.buffers import Slot
from offstep.copy_table import copy_table
from offstep.errors import StructureMismatch
from offstep.options import Mode
from offstep.plans import list_shards, shard_grid
from offstep.records import Leaf, LeafLayout, Plan

_SINGLE_SHARD = (0,)
_READ_AVAL, _READ_SHARDING = attrgetter("aval"), attrgetter("sharding")
_IN_TRANSFER_BYTES = 256 << 20  # enough to keep the bus busy, and little beside the slot
_ROOM = 1.1  # what a copy of the state needs, beside alignment and fragmentation, in states


class Snapshotter:
    """Copies states of one structure into slots.

    Args:
        plan: Where each leaf goes.
        arrays: A state of that structure, in the order of the plan's leaves; it is not kept.
        mode: How to read the arrays; `None` chooses by the devices they are on, and by their memory when the first
            snapshot is taken: training has by then shown what it needs.
        threads: Threads that copy.
    """

    def __init__(self, plan: Plan, arrays: Sequence[Array], *, mode: Mode | None = None, threads: int = 2) -> None:
        self.plan = plan
        self.mode: Mode | None = mode or ("host" if _is_on_cpu(arrays) else None)
        self._threads = threads
        self._table = copy_table(plan)
        self._shapes = [_shape(array) for array in arrays]
        self._dtypes = [_dtype(array) for array in arrays]
        self._shardings = [getattr(array, "sharding", None) for array in arrays]
        self._shards = [_distinct_shards(layout, array) for layout, array in zip(plan.leaves, arrays, strict=True)]
        # What spans processes is copied shard by shard: a program of all of them would hang where one does not save.
        self._is_split = any(layout.chunks is not None for layout in plan.leaves)
        self._has_pointers = [can_be_pointed_at(array) for array in arrays]
        parts = self._list_parts(arrays)
        self._device_copies = [
            (indices, jax.jit(_copy_all, out_shardings=[parts[index].sharding for index in indices]))
            for indices in _group_by_devices(parts)
        ]
        self._known_types: tuple[list[object], list[object]] | None = None  # of the arrays that matched last
        self._host_dtypes = [_native_dtype(layout.leaf) for layout in plan.leaves]
        counts = [len(shards) if self._is_split else 1 for shards in self._shards]
        self._part_dtypes = [
            dtype for dtype, count in zip(self._host_dtypes, counts, strict=True) for _ in range(count)
        ]
        self._is_plain = all(self._has_pointers) and all(shards is _SINGLE_SHARD for shards in self._shards)

    def matches(self, arrays: Sequence[Array]) -> bool:
        """Returns whether the arrays still have the structure that the plan was made for. About 0.1 us a leaf."""
        # What one compiled step makes has the same types each time, the very same objects, which lists find equal
        # without a look into them; a look at each leaf costs ten times as much.
        types = _read_types(arrays)
        if types is not None and types == self._known_types:
            return True
        if not self._has_structure_of(arrays):
            return False
        self._known_types = types
        return True

    def _has_structure_of(self, arrays: Sequence[Array]) -> bool:
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

    def settle_mode(self, arrays: Sequence[Array]) -> Mode:
        """Returns how these arrays will be read, and all later ones; on accelerators their free memory decides."""
        if self.mode is None:
            self.mode = "device_copy" if has_room(arrays) else "transfer"
        return self.mode

    @partial(jax.profiler.annotate_function, name="offstep.snapshot")
    def take(self, arrays: Sequence[Array], slot: Slot, *, are_computed: bool = False) -> None:
        """Copies the arrays into the slot, chunk by chunk, each with its checksum.

        Waits until the arrays are computed, unless the caller did (`are_computed`), with `"transfer"` until they are
        on the host. No reference to their memory is left when it returns. The arrays must satisfy `matches` and must
        not be donated meanwhile: call it on the thread that runs the training steps.

        Raises:
            StructureMismatch: an array has been deleted or resharded.
        """
        keep_alive: list[np.ndarray] = []
        if not are_computed:
            self.wait_until_computed(arrays)
        try:
            if self.mode == "transfer":
                self._transfer(arrays, slot)
                return
            addresses = self._addresses(arrays, keep_alive)
        except (RuntimeError, ValueError) as error:
            raise _unreadable(error) from error
        _native.gather(addresses, self._table.data, slot.buffer, self._threads)

    @partial(jax.profiler.annotate_function, name="offstep.copy_on_device")
    def copy_on_device(self, arrays: Sequence[Array]) -> list[Array]:
        """Dispatches a copy of the arrays on their devices and returns it, without waiting.

        Raises:
            StructureMismatch: an array has been deleted.
        """
        try:
            parts = self._list_parts(arrays)
            copies: list[Array] = [
                None if isinstance(part, jax.Array) else np.array(part, dtype)
                for part, dtype in zip(parts, self._part_dtypes, strict=True)
            ]
            for indices, copy_group in self._device_copies:
                copied = copy_group([parts[index] for index in indices])
                for index, copy in zip(indices, copied, strict=True):
                    copies[index] = copy
        except (RuntimeError, ValueError) as error:
            raise _unreadable(error) from error
        return self._join_parts(copies)

    def _list_parts(self, arrays: Sequence[Array]) -> list[Array]:
        """Returns what is copied on the devices: the arrays, or those of their shards that go into the slot."""
        if not self._is_split:
            return list(arrays)
        return [shard for index, array in enumerate(arrays) for shard in self._shards_of(index, array)]

    def _join_parts(self, parts: list[Array]) -> list[Array]:
        if not self._is_split:
            return parts
        rest = iter(parts)
        return [tuple(itertools.islice(rest, len(shards))) for shards in self._shards]

    @partial(jax.profiler.annotate_function, name="offstep.fetch")
    def fetch(self, private: list[Array], slot: Slot) -> None:
        """Moves arrays that nobody else uses into the slot, leaf by leaf, and empties the list on the way.

        Any thread. Waits for the device. The memory of each leaf on the device is free as soon as it has arrived.
        """
        self._transfer(_drain(private), slot)

    def _transfer(self, arrays: Iterable[Array], slot: Slot) -> None:
        """Brings arrays into the slot; while one is copied there, the next ones are on their way to the host."""
        sources = self._table["source"]
        first_source = 0
        for index, shards in _ahead(self._start_transfers(arrays)):
            hosts = [_to_host(shard, self._host_dtypes[index]) for shard in shards]
            shards.clear()
            if not hosts:  # other processes write this leaf
                continue
            rows = slice(*np.searchsorted(sources, (first_source, first_source + len(hosts))))
            table = self._table[rows].copy()
            table["source"] -= first_source
            _native.gather([_address(host) for host in hosts], table.data, slot.buffer, self._threads)
            first_source += len(hosts)

    def _start_transfers(self, arrays: Iterable[Array]) -> Iterator[tuple[int, list[Array]]]:
        for index, array in enumerate(arrays):
            shards = [_detach(shard) for shard in self._shards_of(index, array)]
            for shard in shards:
                if isinstance(shard, jax.Array):
                    shard.copy_to_host_async()
            yield index, shards

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
        if isinstance(array, tuple):  # copies of its shards
            return list(array)
        shards = self._shards[index]
        if shards is _SINGLE_SHARD:
            return [array]
        return [array.addressable_data(number) for number in shards]


def has_room(arrays: Sequence[Array], read_stats: Callable[[Any], Mapping[str, int] | None] | None = None) -> bool:
    """Returns whether each device has the memory for a copy of what it holds of the arrays.

    The most memory ever used counts as used: a step that is running may need it. A device that does not tell counts as
    one with room.

    Args:
        arrays: The state.
        read_stats: Gives a `jax.Device`'s `memory_stats()`.
    """
    for device, needed_bytes in _bytes_by_device(arrays).items():
        stats = (read_stats(device) if read_stats else device.memory_stats()) or {}
        used_bytes = max(stats.get("bytes_in_use", 0), stats.get("peak_bytes_in_use", 0))
        if "bytes_limit" in stats and stats["bytes_limit"] - used_bytes < _ROOM * needed_bytes:
            return False
    return True


def _bytes_by_device(arrays: Sequence[Array]) -> dict[Any, int]:  # by jax.Device, of which mypy sees nothing
    sizes: dict[Any, int] = {}
    for array in arrays:
        if isinstance(array, jax.Array):
            data = jax.random.key_data(array) if is_key(array) else array
            shard_bytes = math.prod(data.sharding.shard_shape(data.shape)) * data.dtype.itemsize
            for device in data.sharding.addressable_devices:
                sizes[device] = sizes.get(device, 0) + shard_bytes
    return sizes


def _is_on_cpu(arrays: Sequence[Array]) -> bool:
    return {platform(array) for array in arrays if isinstance(array, jax.Array)} <= {"cpu"}


def _drain(arrays: list[Array]) -> Iterator[Array]:
    for index, array in enumerate(arrays):
        arrays[index] = None
        yield array


def _ahead(started: Iterator[tuple[int, list[Array]]]) -> Iterator[tuple[int, list[Array]]]:
    """Yields what it gets, in that order, but takes as many arrays in advance as shall be in transfer at once."""
    waiting: deque[tuple[int, list[Array]]] = deque()
    in_transfer_bytes = 0
    for index, shards in started:
        waiting.append((index, shards))
        in_transfer_bytes += sum(shard.nbytes for shard in shards if isinstance(shard, jax.Array))
        while in_transfer_bytes > _IN_TRANSFER_BYTES:
            in_transfer_bytes -= sum(shard.nbytes for shard in waiting[0][1] if isinstance(shard, jax.Array))
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _detach(shard: Array) -> Array:
    """Returns another array over the same device memory: the host copy that JAX keeps with an array goes with it."""
    if not isinstance(shard, jax.Array):
        return shard
    return (jax.random.key_data(shard) if is_key(shard) else shard).addressable_data(0)


def _copy_all(arrays: list[Array]) -> list[Array]:
    # A plain identity would be forwarded by jit, without a copy.
    return [jnp.copy(array) for array in arrays]


def _read_types(arrays: Sequence[Array]) -> tuple[list[object], list[object]] | None:
    """Returns what says shape, dtype and placement of JAX arrays; `None` where others are among them."""
    try:
        return list(map(_READ_AVAL, arrays)), list(map(_READ_SHARDING, arrays))
    except AttributeError:
        return None


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


def _distinct_shards(layout: LeafLayout, array: Array) -> tuple[int, ...]:
    """Returns which of the addressable shards to read: one replica of each that is in the slot, in C order."""
    if not isinstance(array, jax.Array) or len(array.sharding.device_set) == 1:
        return _SINGLE_SHARD if layout.chunks is None or layout.chunks else ()
    leaf = layout.leaf
    if leaf.prng_impl is not None:
        array = jax.random.key_data(array)
    part = leaf.shard_shape
    found: dict[tuple[int, ...], int] = {}
    for number, shard in enumerate(array.addressable_shards):
        start = tuple((piece.start or 0) // size if size else 0 for piece, size in zip(shard.index, part, strict=True))
        found.setdefault(start, number)
    starts = list(itertools.product(*map(range, shard_grid(leaf))))
    return tuple(found[starts[shard]] for shard in list_shards(layout))


def _native_dtype(leaf: Leaf) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, leaf.dtype, leaf.dtype))


def _to_host(array: Array, dtype: np.dtype) -> np.ndarray:
    """Returns the array in plain memory of this host, in its byte order; a Python number must fit `dtype`."""
    if isinstance(array, jax.Array) and is_key(array):
        array = jax.random.key_data(array)
    return np.asarray(array, dtype, order="C")


def _unreadable(error: Exception) -> StructureMismatch:
    return StructureMismatch(f"the state cannot be read ({error}); was an array of it donated?")


def _address(host: np.ndarray) -> int:
    address: int = host.__array_interface__["data"][0]
    return address
