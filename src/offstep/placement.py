"""Brings stored leaves into device memory, a few at a time, each with the sharding of its destination."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from offstep.arrays import can_be_pointed_at
from offstep.host_memory import keep_from_xla
from offstep.stored import Reader, Region, Span, StoredLeaf, as_dtype, whole

BATCH_BYTES = 32 << 20
"""Leaves are read together up to this size: enough to keep disk and threads busy."""

IN_PLACE_BYTES = 8 * BATCH_BYTES
"""So much at a time of what needs no memory of the host."""

_OVERWRITTEN_FROM_BYTES = 1 << 20
_WORTH_COMPILING_BYTES = 32 << 20
_MANY, _TOGETHER = 256, 16

Array = Any  # jax.Array, np.ndarray or a Python number
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Destination:
    """What a leaf shall become.

    Attributes:
        shape: Of the elements, or of the raw words of PRNG keys.
        dtype: NumPy (or ml_dtypes) name of the elements, or of the raw words of PRNG keys.
        sharding: Devices to put it on; `None` for the default device.
        prng_impl: Name of the PRNG implementation, if it shall be an array of keys; may be empty.
        make: Turns the host array into something else than a `jax.Array`; then `sharding` does not count.
    """

    shape: tuple[int, ...]
    dtype: str
    sharding: jax.sharding.Sharding | None = None
    prng_impl: str | None = None
    make: Callable[[np.ndarray], Array] | None = None


Pair = tuple[StoredLeaf, Destination]


def describe_destination(array: Array) -> Destination:
    """Returns how to make an array like this one (or like a `jax.ShapeDtypeStruct`): same dtype, devices, kind."""
    if isinstance(array, (jax.Array, jax.ShapeDtypeStruct)):
        return _describe_device_array(array)
    if isinstance(array, np.ndarray):
        return Destination(array.shape, array.dtype.name, make=np.array)
    kind = type(array)
    if not can_describe(array):
        raise TypeError(f"no array: {kind.__name__}")
    return Destination((), np.asarray(array).dtype.name, make=lambda host: kind(host[()]))


def can_describe(array: Array) -> bool:
    """Returns whether `describe_destination` takes it."""
    return isinstance(array, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, bool, int, float, complex, np.generic))


@lru_cache  # both are slow, and thousands of leaves have a handful of dtypes
def _name_dtype(dtype: np.dtype) -> str:
    return dtype.name


@lru_cache
def _is_key_dtype(dtype: Any) -> bool:  # NumPy's or JAX's
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def _describe_device_array(array: jax.Array | jax.ShapeDtypeStruct) -> Destination:
    prng_impl = None
    if _is_key_dtype(array.dtype):
        # Of an abstract one JAX does not tell the name in public; the checkpoint has it.
        prng_impl = str(jax.random.key_impl(array)) if isinstance(array, jax.Array) else ""
        array = jax.random.key_data(array) if isinstance(array, jax.Array) else _key_data_struct(array)
    # Where the user did not choose a device, JAX may still move the array: that freedom is kept.
    is_free = isinstance(array, jax.Array) and not getattr(array, "committed", True)
    return Destination(array.shape, _name_dtype(array.dtype), None if is_free else array.sharding, prng_impl)


def _key_data_struct(keys: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    words = jax.eval_shape(jax.random.key_data, keys)
    return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=keys.sharding)  # type: ignore[no-untyped-call]


def place(reader: Reader, pairs: Sequence[Pair], threads: int) -> Iterator[list[tuple[int, Array]]]:
    """Yields lists of (index of the pair, array), in order.

    Keeps nothing of what it has yielded: one batch of `BATCH_BYTES`, or one larger leaf, is in host memory at a time.

    Raises:
        CheckpointDamaged: naming the leaf.
    """
    for batch in split_batches([leaf for leaf, _ in pairs]):
        yield _place_batch(reader, batch, pairs, threads)


# --- memory that is there already ------------------------------------------------------------------------------------


@partial(jax.jit, donate_argnums=0)
def renew(array: jax.Array) -> jax.Array:
    """Returns an array in memory that nobody else sees, of the same shape, dtype and devices; `array` is given up.

    It is the same memory, unless somebody has a view of it: then XLA makes a copy, and leaves the view alone.
    """
    return array


def choose_overwritten(leaves: Sequence[tuple[StoredLeaf, str]]) -> list[int]:
    """Returns the indices of leaves whose old memory is worth having again, given each with the dtype that it gets.

    Fresh memory costs up to 2 ms a MB at its first touch, for XLA's arrays; `renew` 10 to 20 ms for each shape.
    """
    large = [number for number, (leaf, _) in enumerate(leaves) if leaf.size_bytes >= _OVERWRITTEN_FROM_BYTES]
    totals: Counter[tuple[tuple[int, ...], str]] = Counter()
    for leaf in (leaves[number][0] for number in large):
        totals[leaf.shape, leaf.dtype] += leaf.size_bytes
    return [
        number
        for number, (leaf, dtype) in ((number, leaves[number]) for number in large)
        if leaf.dtype == dtype and totals[leaf.shape, leaf.dtype] >= _WORTH_COMPILING_BYTES
    ]


def can_be_overwritten(array: Array) -> bool:
    """Returns whether the memory behind a renewed array can be filled through `open_memory`."""
    return can_be_pointed_at(array) and len(array.sharding.device_set) == 1


def open_memory(array: jax.Array) -> np.ndarray:
    """Returns the memory of an array that nobody else sees yet, writable; it must not outlive the array."""
    array.block_until_ready()
    return np.asarray(_Memory(array)).view(array.dtype).reshape(array.shape)


class _Memory:
    """Tells NumPy where an array lies."""

    def __init__(self, array: jax.Array) -> None:
        size = array.dtype.itemsize * array.size
        address = array.unsafe_buffer_pointer()
        self._array = array  # as long as there is a view of it
        self.__array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}


# --- reading ---------------------------------------------------------------------------------------------------------


def split_batches(leaves: Sequence[StoredLeaf], limit_bytes: int = BATCH_BYTES) -> Iterator[list[int]]:
    """Yields the indices of leaves to be read together."""
    batch: list[int] = []
    total = 0
    for number, leaf in enumerate(leaves):
        size = leaf.size_bytes
        if batch and total + size > limit_bytes:
            yield batch
            batch, total = [], 0
        batch.append(number)
        total += size
    if batch:
        yield batch


def _place_batch(reader: Reader, batch: list[int], pairs: Sequence[Pair], threads: int) -> list[tuple[int, Array]]:
    plans = [_plan(*pairs[number]) for number in batch]
    hosts = iter(reader.read([region for plan in plans for region in plan], threads))
    parts = [[next(hosts) for _ in plan] for plan in plans]
    del hosts
    arrays: list[Array] = [None] * len(batch)
    simple: list[int] = []  # put on devices together, which costs less than one by one
    for at, number in enumerate(batch):
        destination = pairs[number][1]
        parts[at] = [_convert(part, destination.dtype) for part in parts[at]]
        if destination.make is not None:
            arrays[at] = destination.make(parts[at][0])
        elif len(plans[at]) > 1 or plans[at][0].span is not None or _spans_processes(destination):
            arrays[at] = _join(plans[at], parts[at], destination)
        else:
            simple.append(at)
    for at, array in _put([(parts[at][0], pairs[batch[at]][1].sharding) for at in simple]):
        arrays[simple[at]] = array
    # The host copies go away with this call: the devices must have them.
    jax.block_until_ready([array for array in arrays if isinstance(array, jax.Array)])  # type: ignore[no-untyped-call]
    return [(number, _as_keys(array, *pairs[number])) for number, array in zip(batch, arrays, strict=True)]


def _put(hosts: Sequence[tuple[np.ndarray, jax.sharding.Sharding | None]]) -> Iterator[tuple[int, jax.Array]]:
    """Puts whole arrays on devices; yields each with its index.

    Many of one kind go through a compiled program that does nothing: its arguments are put there in a third of the time
    that `device_put` takes, which pays for its compilation.
    """
    kinds: dict[tuple[tuple[int, ...], np.dtype, jax.sharding.Sharding | None], list[int]] = {}
    for number, (host, sharding) in enumerate(hosts):
        kinds.setdefault((host.shape, host.dtype, sharding), []).append(number)
    others: list[int] = []
    for (_, _, sharding), numbers in kinds.items():
        count = len(numbers) // _TOGETHER * _TOGETHER if len(numbers) >= _MANY else 0
        for start in range(0, count, _TOGETHER):
            together = numbers[start : start + _TOGETHER]
            yield from zip(together, _make_pass(sharding)(*(hosts[number][0] for number in together)), strict=True)
        others += numbers[count:]
    if not others:
        return
    shardings = [hosts[number][1] for number in others]
    # One for all is looked at once.
    common: Any = shardings[0] if len(set(shardings)) == 1 else shardings
    yield from zip(others, jax.device_put([hosts[number][0] for number in others], common), strict=True)


@lru_cache(maxsize=16)
def _make_pass(sharding: jax.sharding.Sharding | None) -> Callable[..., tuple[jax.Array, ...]]:
    return jax.jit(lambda *arrays: arrays, out_shardings=sharding)


def _plan(leaf: StoredLeaf, destination: Destination) -> list[Region]:
    """Returns the distinct parts that this process's devices need; a single one without span is the whole leaf."""
    sharding = destination.sharding
    if destination.make is not None or sharding is None or sharding.is_fully_replicated:
        return [Region(leaf)]
    indices = sharding.addressable_devices_indices_map(leaf.shape).values()
    spans = dict.fromkeys(_span(index, leaf.shape) for index in indices if index is not None)
    return [Region(leaf, span) for span in spans]


def _spans_processes(destination: Destination) -> bool:
    # `device_put` would compare the values of all processes, by a collective.
    return destination.sharding is not None and not destination.sharding.is_fully_addressable


def _span(index: Index, shape: tuple[int, ...]) -> Span:
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=False)]
    return (*bounds, *whole(shape[len(bounds) :]))


def _join(plan: list[Region], parts: list[np.ndarray], destination: Destination) -> jax.Array:
    assert destination.sharding is not None
    by_span = {region.box: part for region, part in zip(plan, parts, strict=True)}
    shape = plan[0].leaf.shape

    def find_part(index: Index | None) -> np.ndarray:
        return by_span[_span(index or (), shape)]

    return jax.make_array_from_callback(shape, destination.sharding, find_part)


def _convert(part: np.ndarray, dtype: str) -> np.ndarray:
    wanted = as_dtype(dtype)
    return keep_from_xla(part if part.dtype == wanted else part.astype(wanted))


def _as_keys(array: Array, leaf: StoredLeaf, destination: Destination) -> Array:
    if destination.prng_impl is None:
        return array
    return jax.random.wrap_key_data(array, impl=leaf.prng_impl or destination.prng_impl or None)
