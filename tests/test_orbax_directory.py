"""The directory that we lay out, restored by stock Orbax, stock Keras and TensorStore."""

from __future__ import annotations

import gc
import json
import shutil
import struct
import subprocess
import sys
import time
from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import keras
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from orbax.checkpoint.experimental import v1

from offstep._native import crc32c
from offstep.errors import UnsupportedLeaf
from offstep.formats import FORMATS, orbax_directory
from offstep.formats.orbax_directory import ModelDocuments, data_files, document_files, prepare, write_tensorstore
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


def write_files(directory: Path, files: dict[str, orbax_directory.Parts]) -> None:
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
    assert FORMATS["orbax_directory"] is orbax_directory


def test_importing_the_formats_loads_no_heavy_library() -> None:
    heavy = {"jax", "keras", "numpy", "orbax", "tensorstore"}
    code = (
        f"import sys, offstep.formats; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


# --- the other sink ---------------------------------------------------------------------------------------------------


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


# --- Keras ------------------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable("offstep_tests")
class Vocabulary(keras.layers.Layer):
    """Keeps two files beside its weights, one of them empty."""

    words = "none"

    def call(self, inputs: jax.Array) -> jax.Array:
        return inputs

    def save_assets(self, dir_path: str) -> None:
        (Path(dir_path) / "more").mkdir()
        (Path(dir_path) / "words.txt").write_text(self.words)
        (Path(dir_path) / "more" / "empty.bin").write_bytes(b"")

    def load_assets(self, dir_path: str) -> None:
        assert (Path(dir_path) / "more" / "empty.bin").read_bytes() == b""
        self.words = (Path(dir_path) / "words.txt").read_text()


def make_model() -> keras.Model:
    # Keras numbers seed generators over the whole process, and skips silently what it does not find by name.
    keras.utils.clear_session()
    inputs = keras.Input((8,))
    hidden = keras.layers.Dense(4, name="d1")(inputs)
    hidden = keras.layers.Dropout(0.5, name="dropout")(hidden)
    hidden = keras.layers.BatchNormalization(name="norm")(hidden)
    outputs = keras.layers.Dense(1, name="d2")(Vocabulary(name="vocabulary")(hidden))
    model = keras.Model(inputs, outputs)
    model.compile("adam", "mse", metrics=["mae"])
    return model


def train(model: keras.Model, *callbacks: keras.callbacks.Callback) -> None:
    random = np.random.default_rng(0)
    model.fit(random.normal(size=(16, 8)), random.normal(size=(16, 1)), verbose=0, callbacks=list(callbacks))


def save_model(root: Path, step: int, model: keras.Model, assets: dict[str, bytes]) -> Path:
    config = json.dumps(keras.saving.serialize_keras_object(model))
    return save(root, step, *lay_out(flatten(model.get_state_tree())), ModelDocuments(config, assets))


def test_stock_keras_loads_the_model(tmp_path: Path) -> None:
    model = make_model()
    train(model)
    save_model(tmp_path, 1, model, {})
    keras.utils.clear_session()
    loaded = keras.saving.load_model(tmp_path)
    assert_same(without_metrics(loaded), without_metrics(model))
    x = np.ones((2, 8), np.float32)
    assert np.array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def without_metrics(model: keras.Model) -> Tree:
    """Keras 3.15 makes a model's metrics with the first batch, so a loaded model has none yet."""
    return {name: group for name, group in model.get_state_tree().items() if name != "metrics_variables"}


def test_stock_keras_loads_the_newest_step_and_older_weights_by_path(tmp_path: Path) -> None:
    model = make_model()
    train(model)
    first = jax.tree.map(np.asarray, model.get_state_tree())
    save_model(tmp_path, 9, model, {})
    train(model)
    save_model(tmp_path, 10, model, {})
    other = make_model()
    train(other)
    other.load_weights(tmp_path)
    assert_same(other.get_state_tree(), model.get_state_tree())
    other.load_weights(tmp_path / "9")
    assert_same(other.get_state_tree(), first)


def test_stock_keras_loads_the_assets(tmp_path: Path) -> None:
    model = make_model()
    assets = {"layers/vocabulary/words.txt": b"some words", "layers/vocabulary/more/empty.bin": b""}
    save_model(tmp_path, 1, model, assets)
    assert keras.saving.load_model(tmp_path).get_layer("vocabulary").words == "some words"


def test_metadata_says_what_stock_keras_writes(tmp_path: Path) -> None:
    model = make_model()
    model.get_layer("vocabulary").words = "some words"
    model.get_layer("vocabulary").save_assets = save_one_asset
    train(model, keras.callbacks.OrbaxCheckpoint(str(tmp_path / "stock")))
    config = json.loads((tmp_path / "stock/0/model_config/_strings.json").read_bytes())["config"]
    documents = ModelDocuments(config, {"layers/vocabulary/words.txt": b"some words"})
    ours = save(tmp_path / "ours", 0, *lay_out(flatten(model.get_state_tree())), documents)
    assert describe(ours) == describe(tmp_path / "stock/0") | {"checkpoint_metadata": None}


def save_one_asset(dir_path: str) -> None:
    (Path(dir_path) / "words.txt").write_text("some words")


def describe(step: Path) -> dict[str, object]:
    """All files but those of the databases; JSON with its contents, times and order left out."""
    names = [path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file()]
    return {name: describe_file(step / name) for name in names if "/d/" not in name and "ocdbt" not in name}


def describe_file(path: Path) -> object:
    if path.name == "commit_success.txt":
        return path.read_text().split(" to ")[0]
    if path.stat().st_size == 0:
        return None
    content = json.loads(path.read_bytes())
    if path.name == "_CHECKPOINT_METADATA":
        return content | {key: type(content[key]) for key in ("init_timestamp_nsecs", "commit_timestamp_nsecs")}
    if path.name == "process_0":
        return sorted(content["array_metadatas"], key=lambda item: item["array_metadata"]["param_name"])
    if path.name == "_sharding":
        return {urlsafe_b64decode(name): json.loads(text) for name, text in content.items()}
    return content


# --- parts, names, several devices ------------------------------------------------------------------------------------


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
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", ON_EIGHT_DEVICES, str(step)], check=True, env=environment)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damage() -> Iterator[None]:
    """Orbax leaves coroutines behind when a restore fails; they complain when they are collected."""
    yield
    gc.collect()


may_leave_coroutines = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_arrays(tmp_path_factory.mktemp("small"), 1, example_arrays())


@may_leave_coroutines
@pytest.mark.usefixtures("damage")
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_changes_no_value_silently(small_checkpoint: Path, data: st.DataObject) -> None:
    files = sorted(path for path in (small_checkpoint / "pytree").rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    original = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(original) - 1))
    path.write_bytes(flip(original, bit))
    restored = try_to_restore(small_checkpoint)
    path.write_bytes(original)
    if restored is not None:
        assert_same(restored, nest(example_arrays()))


def flip(content: bytes, bit: int) -> bytes:
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def try_to_restore(step: Path) -> Tree | None:
    try:
        return v1.load(step, checkpointable_name="pytree")
    except Exception:  # noqa: BLE001 (Orbax raises a bare Exception for an array that it cannot read)
        return None


def test_every_flipped_bit_of_a_chunk_is_refused(tmp_path: Path) -> None:
    arrays = {("w",): np.arange(6, dtype=np.int16)}
    step = save_arrays(tmp_path, 1, arrays)
    (path,) = (step / "pytree" / "d").iterdir()
    original = path.read_bytes()
    for bit in range(8 * (12 + 4)):
        path.write_bytes(flip(original, bit))
        with pytest.raises(ValueError, match="Digest mismatch"):
            open_zarr(step / "pytree", "w").read().result()


@may_leave_coroutines
@pytest.mark.usefixtures("damage")
@pytest.mark.parametrize("kept", [0, 1, 100, 4095, 4096, -1])
def test_a_truncated_data_file_is_refused(tmp_path: Path, kept: int) -> None:
    step = save_arrays(tmp_path, 1, example_arrays())
    (path,) = (step / "pytree" / "d").iterdir()
    path.write_bytes(path.read_bytes()[:kept])
    assert try_to_restore(step) is None
