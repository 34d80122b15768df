"""Slots filled by hand, as a snapshot would fill them, and the stock readers that restore what becomes of them."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from orbax.checkpoint.experimental import v1

from offstep._native import crc32c
from offstep.formats.orbax_directory import ModelDocuments, Parts, data_files, prepare
from offstep.records import Leaf, LeafLayout, PathKey, Plan

Tree = Any  # nested dicts and lists of arrays
Arrays = dict[tuple[PathKey, ...], np.ndarray]

SINGLE_DEVICE = '{"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0"}'
GAP_BYTES = 100


def lay_out(
    arrays: Arrays, chunk_shapes: dict[tuple[PathKey, ...], tuple[int, ...]] | None = None
) -> tuple[Plan, bytearray]:
    """Makes a plan and fills one slot, as the snapshot would; gaps hold 0xEE, not zeros."""
    slot = bytearray()
    layouts = []
    for path, array in arrays.items():
        chunk_shape = (chunk_shapes or {}).get(path, array.shape)
        leaf = Leaf(path, array.shape, array.dtype.name, "jax.Array", chunk_shape, SINGLE_DEVICE)
        blocks = list(cut_into_chunks(array, chunk_shape))
        chunk_bytes = len(blocks[0])
        grid = tuple(-(-size // chunk) for size, chunk in zip(array.shape, chunk_shape, strict=True))
        layouts.append(LeafLayout(leaf, chunk_shape, grid, len(slot), chunk_bytes, chunk_bytes + 4 + GAP_BYTES))
        for block in blocks:
            slot += block + struct.pack("<I", crc32c(block)) + b"\xee" * GAP_BYTES
    slot += b"\xee" * (-len(slot) % 4096)
    return Plan(tuple(layouts), len(slot)), slot


def cut_into_chunks(array: np.ndarray, chunk_shape: tuple[int, ...]) -> Iterator[bytes]:
    """Yields chunks in C order over the grid, those at the upper edge padded with zeros."""
    starts = (range(0, size, chunk) for size, chunk in zip(array.shape, chunk_shape, strict=True))
    for corner in product(*starts):
        part = array[tuple(slice(at, at + chunk) for at, chunk in zip(corner, chunk_shape, strict=True))]
        block = np.zeros(chunk_shape, array.dtype)
        block[tuple(map(slice, part.shape))] = part
        yield block.tobytes()


def nest(arrays: Arrays) -> Tree:
    """Turns paths into nested dicts and lists."""
    if () in arrays:
        return arrays[()]
    groups: dict[PathKey, Arrays] = {}
    for path, array in arrays.items():
        groups.setdefault(path[0], {})[path[1:]] = array
    if all(isinstance(key, int) for key in groups):
        return [nest(groups[key]) for key in sorted(groups)]
    return {key: nest(group) for key, group in groups.items()}


def flatten(tree: Tree) -> Arrays:
    """The inverse of `nest`, for what a model's `get_state_tree()` or Orbax returns."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path): np.asarray(leaf) for path, leaf in leaves
    }


def write_files(directory: Path, files: dict[str, Parts]) -> None:
    for name, parts in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(parts))


def save(root: Path, step: int, plan: Plan, slot: bytearray, documents: ModelDocuments | None = None) -> Path:
    target = root / str(step)
    prepared = prepare(plan, documents)
    write_files(target, data_files(prepared, memoryview(slot), step=step, target=str(target), now_ns=time.time_ns()))
    return target


def save_arrays(root: Path, step: int, arrays: Arrays) -> Path:
    return save(root, step, *lay_out(arrays))


def assert_same(actual: Tree, expected: Tree) -> None:
    """Compares structure, dtypes, shapes and bytes."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        got_array, want_array = np.asarray(got), np.asarray(want)
        assert (got_array.dtype, got_array.shape) == (want_array.dtype, want_array.shape)
        assert got_array.tobytes() == want_array.tobytes()


def open_zarr(item: Path, name: str) -> ts.TensorStore:
    base = {"driver": "file", "path": f"{item}/"}
    return ts.open({"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}).result()


def restore_with_manager(root: Path, step: int) -> Tree:
    with ocp.CheckpointManager(root) as manager:
        return manager.restore(step, args=ocp.args.Composite(pytree=ocp.args.StandardRestore()))["pytree"]


def restore_with_standard_checkpointer(root: Path, step: int) -> Tree:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(root / str(step) / "pytree")


def restore_with_pytree_checkpointer(root: Path, step: int) -> Tree:
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(root / str(step) / "pytree")


def restore_with_v1_checkpointer(root: Path, step: int) -> Tree:
    with v1.training.Checkpointer(root) as checkpointer:
        return checkpointer.load_checkpointables(step)["pytree"]


READERS: dict[str, Callable[[Path, int], Tree]] = {
    "v0 CheckpointManager": restore_with_manager,
    "v0 StandardCheckpointer": restore_with_standard_checkpointer,
    "v0 PyTreeCheckpointer": restore_with_pytree_checkpointer,
    "v1 load": lambda root, step: v1.load(root / str(step), checkpointable_name="pytree"),
    "v1 load_checkpointables": lambda root, step: v1.load_checkpointables(root / str(step))["pytree"],
    "v1 Checkpointer": restore_with_v1_checkpointer,
}

all_readers = pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())


def example_arrays() -> Arrays:
    random = np.random.default_rng(0)
    return {
        ("trainable_variables", "d1", "kernel"): random.normal(size=(8, 4)).astype(np.float32),
        ("trainable_variables", "d1", "bias"): random.normal(size=(4,)).astype(ml_dtypes.bfloat16),
        ("optimizer_variables", "iteration"): np.array(7, np.int32),
        ("layers", 0, "gamma"): random.normal(size=(3,)).astype(np.float16),
        ("layers", 1, "gamma"): random.normal(size=(3,)).astype(np.float16),
    }
