"""The directory that we lay out, restored by stock Orbax and TensorStore."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import interpreters
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from orbax.checkpoint.experimental import v1
from slots import (
    SINGLE_DEVICE,
    Arrays,
    Tree,
    all_readers,
    assert_same,
    example_arrays,
    lay_out,
    nest,
    open_zarr,
    restore_with_v1_checkpointer,
    save,
    save_arrays,
    write_files,
)

from offstep.errors import UnsupportedLeaf
from offstep.formats import FORMATS, orbax_directory, orbax_step
from offstep.formats.orbax_directory import PreparedDirectory, data_files, document_files, prepare
from offstep.records import Leaf, LeafLayout, Plan


@all_readers
def test_stock_readers_restore_the_tree(tmp_path: Path, read: Callable[[Path, int], Tree]) -> None:
    arrays = example_arrays()
    save_arrays(tmp_path, 3, arrays)
    assert_same(read(tmp_path, 3), nest(arrays))


DTYPES = sorted(orbax_directory.DTYPES)


@pytest.fixture
def wide_types() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("wide_types")
@all_readers
def test_stock_readers_restore_every_dtype(tmp_path: Path, read: Callable[[Path, int], Tree]) -> None:
    arrays = {
        (name, shape): np.arange(int(np.prod(size))).reshape(size)
        for name in DTYPES
        for shape, size in [("s", ()), ("v", (5,)), ("m", (2, 3))]
    }
    arrays = {path: (array % 7).astype(as_dtype(path[0])) for path, array in arrays.items()}
    save_arrays(tmp_path, 1, arrays)
    assert_same(read(tmp_path, 1), nest(arrays))


def as_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


@all_readers
def test_chunks_are_put_together_by_stock_readers(tmp_path: Path, read: Callable[[Path, int], Tree]) -> None:
    shapes = {("rows",): (10, 6), ("columns",): (4, 12), ("both",): (10, 9, 3), ("vector",): (1000,)}
    chunk_shapes = {("rows",): (3, 6), ("columns",): (4, 5), ("both",): (4, 2, 3), ("vector",): (77,)}
    arrays = {path: np.random.default_rng(1).normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    save(tmp_path, 1, *lay_out(arrays, chunk_shapes))
    assert_same(read(tmp_path, 1), nest(arrays))


def test_tensorstore_reads_chunks_as_laid_out(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.int16).reshape(10, 6)
    item = save(tmp_path, 1, *lay_out({("a", "b"): array}, {("a", "b"): (3, 4)})) / "pytree"
    store = open_zarr(item, "a.b")
    assert store.chunk_layout.read_chunk.shape == (3, 4)
    assert np.array_equal(store.read().result(), array)


@all_readers
def test_empty_containers_come_back(tmp_path: Path, read: Callable[[Path, int], Tree]) -> None:
    plan, slot = lay_out({("a", "x"): np.ones(3, np.float32)})
    plan = replace(plan, empty_nodes=((("none",), "Dict"), (("a", "list"), "List")))
    save(tmp_path, 1, plan, slot)
    assert_same(read(tmp_path, 1), {"a": {"x": np.ones(3, np.float32), "list": []}, "none": {}})


@all_readers
def test_prng_keys_come_back_as_keys(tmp_path: Path, read: Callable[[Path, int], Tree]) -> None:
    keys = {"one": jax.random.key(3), "many": jax.random.split(jax.random.key(4, impl="rbg"), 3)}
    plan, slot = lay_out({(name,): np.asarray(jax.random.key_data(key)) for name, key in keys.items()})
    leaves = [
        replace(layout, leaf=replace(layout.leaf, prng_impl=str(jax.random.key_impl(keys[layout.leaf.name]))))
        for layout in plan.leaves
    ]
    save(tmp_path, 1, replace(plan, leaves=tuple(leaves)), slot)
    restored = read(tmp_path, 1)
    for name, key in keys.items():
        assert restored[name].dtype == key.dtype
        assert np.array_equal(jax.random.key_data(restored[name]), jax.random.key_data(key))


@all_readers
def test_host_arrays_and_scalars_come_back(tmp_path: Path, read: Callable[[Path, int], Tree]) -> None:
    plan, slot = lay_out({("host",): np.arange(3, dtype=np.int64), ("count",): np.array(5, np.int64)})
    kinds = ("np.ndarray", "scalar")
    leaves = [
        replace(layout, leaf=replace(layout.leaf, value_type=kind, sharding=None))
        for layout, kind in zip(plan.leaves, kinds, strict=True)
    ]
    save(tmp_path, 1, replace(plan, leaves=tuple(leaves)), slot)
    restored = read(tmp_path, 1)
    assert isinstance(restored["host"], np.ndarray)
    assert restored["host"].tolist() == [0, 1, 2]
    assert (type(restored["count"]), restored["count"]) == (int, 5)


def test_a_thousand_leaves_come_back(tmp_path: Path) -> None:
    arrays: Arrays = {("layers", f"l{i}", "w"): np.full((3,), i, np.float32) for i in range(1000)}
    save_arrays(tmp_path, 1, arrays)
    assert_same(restore_with_v1_checkpointer(tmp_path, 1), nest(arrays))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
@all_readers
def test_leaves_without_elements_come_back(
    tmp_path: Path, read: Callable[[Path, int], Tree], shape: tuple[int, ...]
) -> None:
    plan, slot = lay_out({("full",): np.ones(2, np.float32)})
    leaf = Leaf(("empty",), shape, "float32", "jax.Array", shape, SINGLE_DEVICE)
    layout = LeafLayout(leaf, shape, tuple(min(1, size) for size in shape), len(slot), 0, 4)
    save(tmp_path, 1, replace(plan, leaves=(*plan.leaves, layout)), slot)
    assert_same(read(tmp_path, 1), {"full": np.ones(2, np.float32), "empty": np.zeros(shape, np.float32)})


@pytest.mark.parametrize("dtype", ["uint4", "uint2", "float8_e4m3", "float6_e2m3fn", "object"])
def test_a_dtype_that_stock_orbax_cannot_restore_is_refused(dtype: str) -> None:
    layout = LeafLayout(Leaf(("a", "b"), (1,), dtype), (1,), (1,), 0, 1, 5)
    with pytest.raises(UnsupportedLeaf, match=f"a.b: stock Orbax cannot restore {dtype}; cast the leaf"):
        prepare(Plan((layout,), 4096), None)


def test_two_leaves_under_one_name_are_refused() -> None:
    plan, _ = lay_out({("a", "b.c"): np.ones(1), ("a.b", "c"): np.ones(1)})
    with pytest.raises(UnsupportedLeaf, match=r"Orbax would store both as 'a\.b\.c'"):
        prepare(plan, None)


def test_a_slot_of_another_size_is_refused() -> None:
    plan, slot = lay_out({("a",): np.ones(1)})
    with pytest.raises(ValueError, match="the slot has 8192 bytes, its plan says 4096"):
        data_files(prepare(plan, None), memoryview(slot * 2), step=1, target="/x/1", now_ns=0)


def test_the_slot_is_handed_on_without_a_copy() -> None:
    plan, slot = lay_out({("a",): np.ones(1)})
    view = memoryview(slot)
    files = data_files(prepare(plan, None), view, step=1, target="/x/1", now_ns=0)
    (name,) = (name for name in files if name.startswith("pytree/d/"))
    assert files[name][0] is view


def test_two_saves_share_no_file_name_of_data() -> None:
    plan, slot = lay_out({("a",): np.ones(1)})
    prepared = prepare(plan, None)
    saves = [data_files(prepared, memoryview(slot), step=1, target="/x/1", now_ns=0) for _ in range(2)]
    assert saves[0].keys() != saves[1].keys()
    assert saves[0]["pytree/manifest.ocdbt"] != saves[1]["pytree/manifest.ocdbt"]


def test_the_format_is_found_by_name() -> None:
    assert FORMATS["orbax_directory"].write is orbax_step.write


def test_importing_the_formats_loads_no_heavy_library() -> None:
    heavy = {"jax", "keras", "h5py", "orbax", "tensorstore"}
    code = (
        f"import sys, offstep.formats; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


# --- the other sink ---------------------------------------------------------------------------------------------------


def write_tensorstore(prepared: PreparedDirectory, slot: memoryview, directory: Path) -> None:
    """Writes the database with the arrays through TensorStore, as Orbax does, in one transaction."""
    config = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000, "manifest_kind": "single"}
    spec = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{directory / 'pytree'}/"},
        "config": config,
        "assume_config": True,
        "target_data_file_size": 2**31,
    }
    store = ts.KvStore.open(spec, context=ts.Context({"file_io_sync": False})).result()
    with ts.Transaction() as transaction:
        writer = store.with_transaction(transaction)
        for key, value in prepared.state.entries:
            is_inline = isinstance(value, bytes)
            writer[key] = value if is_inline else bytes(slot[value.offset : value.offset + value.size])


def save_through_tensorstore(root: Path, step: int, arrays: Arrays) -> Path:
    plan, slot = lay_out(arrays)
    prepared = prepare(plan, None)
    target = root / str(step)
    target.mkdir(parents=True)
    write_tensorstore(prepared, memoryview(slot), target)
    write_files(target, document_files(prepared, step=step, target=str(target), now_ns=time.time_ns()))
    return target


@all_readers
def test_what_tensorstore_wrote_is_restored_too(tmp_path: Path, read: Callable[[Path, int], Tree]) -> None:
    arrays = example_arrays()
    save_through_tensorstore(tmp_path, 3, arrays)
    assert_same(read(tmp_path, 3), nest(arrays))


def test_both_sinks_store_the_same_entries(tmp_path: Path) -> None:
    arrays = example_arrays()
    ours = save_arrays(tmp_path / "image", 1, arrays)
    theirs = save_through_tensorstore(tmp_path / "with 100% odd #name?", 1, arrays)
    assert read_entries(ours / "pytree") == read_entries(theirs / "pytree")


def read_entries(item: Path) -> dict[bytes, bytes]:
    store = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}}).result()
    return {key: store.read(key).result().value for key in store.list().result()}


# --- parts, names, several devices ------------------------------------------------------------------------------------


def test_metadata_tells_shapes_and_dtypes_without_reading_arrays(tmp_path: Path) -> None:
    arrays = example_arrays()
    step = save_arrays(tmp_path, 1, arrays)
    leaves = v1.metadata(step, checkpointable_name="pytree").metadata
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), leaves)
    assert described == nest({path: (array.shape, array.dtype) for path, array in arrays.items()})


def test_v1_restores_a_part_of_the_tree(tmp_path: Path) -> None:
    arrays = example_arrays()
    step = save_arrays(tmp_path, 1, arrays)
    wanted = {"trainable_variables": {"d1": {"kernel": jax.ShapeDtypeStruct((8, 4), np.float32)}}}
    options = v1.options.PyTreeOptions(loading=v1.options.PyTreeOptions.Loading(partial_load=True))
    with v1.Context(pytree_options=options):
        restored = v1.load(step, wanted, checkpointable_name="pytree")
    kernel = ("trainable_variables", "d1", "kernel")
    assert_same(restored, nest({kernel: arrays[kernel]}))


def test_v0_restores_a_part_of_the_tree(tmp_path: Path) -> None:
    arrays = example_arrays()
    step = save_arrays(tmp_path, 1, arrays)
    wanted = {"optimizer_variables": {"iteration": 0}}
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(step / "pytree", args=ocp.args.PyTreeRestore(wanted, partial_restore=True))
    assert restored["optimizer_variables"]["iteration"] == 7


@pytest.mark.parametrize(
    "name", ["7.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp-1a2b", "7.offstep-trash-1a2b", ".offstep-7"]
)
def test_names_in_progress_are_skipped_by_stock_scanners(tmp_path: Path, name: str) -> None:
    step = save_arrays(tmp_path, 3, example_arrays())
    shutil.copytree(step, tmp_path / name)
    with ocp.CheckpointManager(tmp_path) as manager:
        assert list(manager.all_steps()) == [3]
    with v1.training.Checkpointer(tmp_path) as checkpointer:
        assert [checkpoint.step for checkpoint in checkpointer.checkpoints] == [3]
    assert ocp.utils.checkpoint_steps(tmp_path) == [3]
    assert (tmp_path / name).exists()


ON_EIGHT_DEVICES = """
import sys, jax, numpy as np
import orbax.checkpoint.experimental.v1 as v1
P = jax.sharding.PartitionSpec
restored = v1.load(sys.argv[1], checkpointable_name="pytree")["w"]
assert restored.sharding.spec == P("batch", "model"), restored.sharding
assert np.array_equal(restored, np.arange(128).reshape(8, 16)), restored
mesh = jax.make_mesh((4, 2), ("x", "y"))
target = jax.ShapeDtypeStruct((8, 16), np.int32, sharding=jax.sharding.NamedSharding(mesh, P("y", "x")))
resharded = v1.load(sys.argv[1], {"w": target}, checkpointable_name="pytree")["w"]
assert resharded.sharding == target.sharding, resharded.sharding
assert np.array_equal(resharded, np.arange(128).reshape(8, 16)), resharded
"""


def test_shards_are_restored_and_resharded_on_several_devices(tmp_path: Path) -> None:
    plan, slot = lay_out({("w",): np.arange(128, dtype=np.int32).reshape(8, 16)}, {("w",): (4, 4)})
    sharding = {
        "sharding_type": "NamedSharding",
        "shape": [2, 4],
        "axis_names": ["batch", "model"],
        "axis_types": ["AxisType.Auto", "AxisType.Auto"],
        "partition_spec": ["batch", "model"],
        "device_mesh": {"mesh": [[{"id": 4 * row + column} for column in range(4)] for row in range(2)]},
    }
    layout = plan.leaves[0]
    layout = replace(layout, leaf=replace(layout.leaf, sharding=json.dumps(sharding)))
    step = save(tmp_path, 1, replace(plan, leaves=(layout,)), slot)
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = interpreters.run(["-c", ON_EIGHT_DEVICES, step], env=environment)
    assert done.returncode == 0, done.stderr
