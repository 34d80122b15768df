"""What is saved comes back: into models and trees, whole, in part, renamed, cast; and errors say what to do."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import jax
import jax.numpy as jnp
import keras
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import zoo
from keras import layers
from orbax.checkpoint import v1
from runs import assert_same, fit, make_model, read_state
from slots import save_arrays

import offstep
from offstep import Checkpointer, ModelCheckpoint
from offstep.errors import CheckpointDamaged, CheckpointNotFound, StructureMismatch, UnsupportedFormat

pytestmark = pytest.mark.usefixtures("one_writer")

Model = Any  # Keras carries no types


def save_model(model: Model, directory: Path, epochs: int = 1, **options: Any) -> dict[str, np.ndarray]:
    """Trains and saves a model of `runs`; returns its state."""
    fit(model, [ModelCheckpoint(directory / "{step}", in_process=True, **options)], epochs=epochs)
    return read_state(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A root with one step of the model of `runs`, and the state in it. Not to be changed."""
    directory = tmp_path_factory.mktemp("saved")
    return directory, save_model(make_model(), directory)


def flip_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def data_file(step: Path) -> Path:
    return max((step / "pytree/d").iterdir(), key=lambda path: path.stat().st_size)


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_model_gets_its_whole_state_back(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    directory, state = saved
    model = make_model()
    fit(model, [], epochs=2)
    report = offstep.restore(model, directory)
    assert_same(read_state(model), state)
    assert set(report.restored) == set(state)
    assert (report.missing, report.left_over, dict(report.by_position)) == ((), (), {})
    assert (report.path, report.step) == (directory / "7", 7)
    assert report.manifest["epoch"] == 1


def test_a_restored_model_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    whole = make_model()
    fit(whole, [], epochs=4)
    save_model(make_model(), tmp_path, epochs=2)
    resumed = make_model()
    offstep.restore(resumed, tmp_path)
    fit(resumed, [], initial_epoch=2, epochs=4)
    assert_same(read_state(resumed), read_state(whole))


def test_an_optimizer_that_is_not_built_gets_its_state(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    directory, state = saved
    model = make_model()
    assert not model.optimizer.built
    offstep.restore(model, directory)
    restored = read_state(model)
    assert_same(restored, {name: state[name] for name in restored})
    assert all(name.startswith("metrics_variables") for name in state if name not in restored)


def test_restore_in_a_callback_of_fit_takes_effect(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    directory, state = saved
    model = make_model()
    seen: list[Any] = []

    def restore(batch: int, logs: Any) -> None:
        if batch == 4:
            offstep.restore(model, directory)
            seen.append(read_state(model))

    fit(model, [keras.callbacks.LambdaCallback(on_train_batch_end=restore)], epochs=1)
    assert_same(seen[0], state)
    assert int(model.optimizer.iterations) == 7 + 2


ZOO = (
    "sequential_built_by_fit",
    "subclassed",
    "frozen_before_built",
    "scaled_loss",
    "mixed_bfloat16",
    *(
        pytest.param(name, marks=pytest.mark.campaign)
        for name in (
            "sequential_with_input",
            "sequential_without_names_in_order",
            "nested",
            "dropout_and_batch_norm",
            "frozen",
            "normalized",
            "multi_optimizer",
            "accumulated_gradients",
            "moving_average",
            "adapted_by_low_rank",
        )
    ),
)


def values(model: Model) -> list[bytes]:
    variables = [*model.trainable_variables, *model.non_trainable_variables, *model.optimizer.variables]
    return [np.asarray(v.value).tobytes() for v in variables]


def train(model: Model, *callbacks: Any, seed: int = 0) -> None:
    keras.utils.set_random_seed(seed)
    with warnings.catch_warnings():  # the notes are for other tests
        warnings.simplefilter("ignore", UserWarning)
        model.fit(*zoo.make_data(), batch_size=4, epochs=1, verbose=0, callbacks=list(callbacks))


@pytest.mark.parametrize("name", ZOO)
def test_a_second_model_of_the_same_code_is_restored_whatever_keras_calls_it(name: str, tmp_path: Path) -> None:
    first = zoo.ZOO[name]()
    train(first, ModelCheckpoint(tmp_path / "{step}", in_process=True))
    expected = values(first) if name != "moving_average" else None  # its averages are put in at the end of `fit`
    second = zoo.ZOO[name]()
    train(second, seed=1)
    report = offstep.restore(second, tmp_path)
    assert [name for name in report.missing if not name.startswith("metrics_variables")] == []
    if expected is not None:
        assert values(second) == expected
        x = zoo.make_data()[0]
        assert np.array_equal(first.predict(x, verbose=0), second.predict(x, verbose=0))


def make_stack(*names: str | None, width: int = 4, **compile_options: Any) -> Model:
    inputs = x = layers.Input((3,), name="inputs")
    for name in names:
        x = layers.Dense(width, name=name)(x) if name else layers.Dense(width)(x)
    model = keras.Model(inputs, layers.Dense(1, name="last")(x))
    model.compile(**({"optimizer": "adam", "loss": "mse"} | compile_options))
    return model


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """A root with a step of a stack of the layers a and b, and the model. Not to be changed."""
    directory = tmp_path_factory.mktemp("stack")
    model = make_stack("a", "b")
    fit(model, [ModelCheckpoint(directory / "{step}", in_process=True)], epochs=1)
    return directory, model


def test_a_checkpoint_of_stock_keras_is_matched_by_position_and_says_so(tmp_path: Path) -> None:
    first = make_stack(None, None)
    fit(first, [keras.callbacks.OrbaxCheckpoint(str(tmp_path))], epochs=1)
    second = make_stack(None, None)
    report = offstep.restore(second, tmp_path)
    assert values(second) == values(first)
    names = dict(report.by_position)
    assert names[f"trainable_variables/{second.layers[1].name}/kernel"] == (
        f"trainable_variables/{first.layers[1].name}/kernel"
    )
    assert not [name for name in names if "/last/" in name]


def test_a_checkpoint_of_stock_keras_is_restored_by_name(tmp_path: Path) -> None:
    first = make_model()
    fit(first, [keras.callbacks.OrbaxCheckpoint(str(tmp_path))], epochs=1)
    second = make_model()
    fit(second, [], epochs=2)
    report = offstep.restore(second, tmp_path)
    assert_same(read_state(second), read_state(first))
    assert not report.by_position


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_a_file_of_stock_keras_is_restored(suffix: str, tmp_path: Path) -> None:
    first = make_model()
    fit(first, [], epochs=1)
    path = tmp_path / f"model{suffix}"
    first.save_weights(path) if suffix == ".weights.h5" else first.save(path)
    second = make_model()
    fit(second, [], epochs=2)
    report = offstep.restore(second, path)
    kept = [name for name in report.missing if "seed" not in name and "metrics" not in name]
    assert kept == []
    state, expected = read_state(second), read_state(first)
    assert_same({name: state[name] for name in report.restored}, {name: expected[name] for name in report.restored})
    assert {name.split("/")[0] for name in report.restored} >= {"trainable_variables", "optimizer_variables"}


@pytest.mark.filterwarnings("ignore:Keras itself writes each file:UserWarning")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of stock Keras
@pytest.mark.parametrize("name", ["m.h5", "m.weights.h5"])
def test_weights_of_a_legacy_file_are_loaded_by_keras_and_the_optimizer_is_said_to_be_missing(
    name: str, tmp_path: Path
) -> None:
    first, second = make_model(), make_model()
    fit(first, [ModelCheckpoint(tmp_path / name)], epochs=1)
    report = offstep.restore(second, tmp_path / name)
    assert report.step == 7
    assert "Keras's legacy format" in report.note
    assert {path.split("/")[0] for path in report.restored} == {"trainable_variables", "non_trainable_variables"}
    assert {path.split("/")[0] for path in report.missing} >= {"optimizer_variables"}
    assert np.array_equal(first.get_layer("first").kernel, second.get_layer("first").kernel)
    if name == "m.h5":
        assert offstep.latest(tmp_path) is None  # such a file may be anybody's
        with pytest.raises(StructureMismatch, match=r"stock Keras cannot load .*m.h5 into this model"):
            offstep.restore(make_stack("a", "b", width=7), tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:5000])
        with pytest.raises(CheckpointDamaged, match="restore another"):
            offstep.restore(second, tmp_path / name)


def test_hdf5_that_is_no_model_is_told(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"] = np.ones(3)
    with pytest.raises(UnsupportedFormat, match="is HDF5, but holds no model of Keras"):
        offstep.restore(make_model(), tmp_path / "data.h5")


def test_a_file_that_a_layer_computes_is_left_to_keras(tmp_path: Path) -> None:
    keras.utils.clear_session()
    first, second = zoo.ZOO["adapted_by_low_rank"](), zoo.ZOO["adapted_by_low_rank"]()
    first.save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(StructureMismatch, match=r"can only be restored whole"):
        offstep.restore(second, tmp_path / "m.weights.h5", partial="dense")
    report = offstep.restore(second, tmp_path / "m.weights.h5")
    assert "keras.Model.load_weights has loaded the file" in report.note
    x = zoo.make_data()[0]
    assert np.array_equal(first.predict(x, verbose=0), second.predict(x, verbose=0))


def test_frozen_weights_are_restored_into_a_model_that_trains_them(tmp_path: Path) -> None:
    first = make_stack("a", "b")
    first.get_layer("a").trainable = False
    first.compile("sgd", "mse")
    fit(first, [ModelCheckpoint(tmp_path / "{step}", in_process=True)], epochs=1)
    second = make_stack("a", "b", optimizer="sgd")
    offstep.restore(second, tmp_path)
    assert [np.asarray(w).tolist() for w in second.weights] == [np.asarray(w).tolist() for w in first.weights]


def test_only_some_layers_are_restored(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    directory, state = saved
    model = make_model()
    fit(model, [], epochs=2)
    before = read_state(model)
    report = offstep.restore(model, directory, partial=["first/kernel", "norm"])
    after = read_state(model)
    assert "trainable_variables/first/kernel" in report.restored
    assert len(report.restored) == 5
    for name, array in after.items():
        source = state if name in report.restored else before
        assert array.tobytes() == source[name].tobytes()


def make_sequence(width: int, *extra: Any) -> Model:
    """A model whose names are all of Keras's making, other ones in each model of a process."""
    layers = [keras.layers.Input((3,)), keras.layers.Dense(width), *extra, keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile("adam", "mse")
    return model


def test_a_later_model_is_restored_in_part_and_its_faults_are_told_by_leaf(tmp_path: Path) -> None:
    keras.utils.clear_session()
    model = make_sequence(2)
    fit(model, [ModelCheckpoint(tmp_path / "{step}")], epochs=1)
    later = make_sequence(2, keras.layers.Dropout(0.1))
    report = offstep.restore(later, tmp_path, partial="dense_1/bias")
    assert report.restored == ("trainable_variables/sequential_1/dense_3/bias",)
    report = offstep.restore(later, tmp_path)
    assert [name for name in report.missing if not name.startswith("metrics")] == [
        "non_trainable_variables/seed_generator/seed_generator_state"
    ]
    assert np.array_equal(later.layers[-1].kernel, model.layers[-1].kernel)
    with pytest.raises(
        StructureMismatch, match=r"dense_4/kernel: the checkpoint holds float32\[3, 2\] as .*/dense/kernel"
    ):
        offstep.restore(make_sequence(5), tmp_path)


def test_a_predicate_chooses_what_is_restored(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    report = offstep.restore(make_model(), saved[0], partial=lambda name: name.endswith("bias"))
    assert report.restored == ("trainable_variables/first/bias", "trainable_variables/last/bias")


@pytest.mark.parametrize("rename", [{"a": "encoder"}, lambda name: name.replace("/a/", "/encoder/")], ids=["dict", "f"])
def test_a_layer_is_restored_into_one_of_another_name(rename: Any, stack: tuple[Path, Model]) -> None:
    directory, first = stack
    second = make_stack("encoder", "b")
    report = offstep.restore(second, directory, rename=rename, partial="trainable_variables")
    assert [np.asarray(w).tolist() for w in second.weights] == [np.asarray(w).tolist() for w in first.weights]
    assert not report.by_position


def test_one_layer_is_copied_to_another_that_exists_too(tmp_path: Path) -> None:
    first = make_stack("a", "b", width=3)
    fit(first, [ModelCheckpoint(tmp_path / "{step}", in_process=True)], epochs=1)
    second = make_stack("a", "b", width=3)
    offstep.restore(second, tmp_path, rename={"a": "b"}, partial="b")
    assert np.array_equal(second.get_layer("b").kernel, first.get_layer("a").kernel)
    assert not np.array_equal(second.get_layer("a").kernel, first.get_layer("a").kernel)


def test_layers_without_weights_do_not_matter(stack: tuple[Path, Model]) -> None:
    directory, first = stack
    inputs = layers.Input((3,))
    x = layers.Dropout(0.1)(layers.Activation("relu")(layers.Dense(4, name="a")(inputs)))
    second = keras.Model(inputs, layers.Dense(1, name="last")(layers.Dense(4, name="b")(x)))
    second.compile("adam", "mse")
    report = offstep.restore(second, directory)
    assert [np.asarray(w).tolist() for w in second.trainable_weights] == [
        np.asarray(w).tolist() for w in first.trainable_weights
    ]
    assert [name.rsplit("/")[-1] for name in report.missing] == ["seed_generator_state"]


def test_a_model_without_optimizer_takes_the_weights(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    config = make_model().get_config()
    keras.utils.clear_session()
    model = keras.Model.from_config(config)
    report = offstep.restore(model, saved[0])
    assert np.array_equal(model.get_layer("first").kernel, saved[1]["trainable_variables/first/kernel"])
    assert {name.split("/")[0] for name in report.left_over} == {"optimizer_variables", "metrics_variables"}


def test_weights_alone_leave_the_optimizer_as_it_is(tmp_path: Path) -> None:
    first = make_model()
    save_model(first, tmp_path, save_weights_only=True)
    second = make_model()
    report = offstep.restore(second, tmp_path)
    assert np.array_equal(second.get_layer("first").kernel, first.get_layer("first").kernel)
    assert [name for name in report.missing if name.startswith("optimizer_variables")]


# --- trees -----------------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    count: Any
    mu: Any


def make_tree() -> dict[str, Any]:
    return {
        "params": {"w": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "b": jnp.ones(3, jnp.int8)},
        "opt": Moments(jnp.int32(4), [jnp.zeros((0, 2)), jnp.full((3,), 2.5)]),
        "key": jax.random.key(7),
        "host": np.arange(5.0),
        "step": 12,
        "rate": 0.5,
        "flag": True,
        "nothing": {},
    }


def assert_same_tree(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert type(left) is type(right)
        assert to_host(left).dtype == to_host(right).dtype
        assert to_host(left).tobytes() == to_host(right).tobytes()


def to_host(leaf: Any) -> np.ndarray:
    is_key = jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


@pytest.fixture(scope="module")
def saved_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tree")
    with Checkpointer(directory, in_process=True) as checkpointer:
        checkpointer.save(3, make_tree())
    return directory


def test_a_tree_comes_back_as_it_was(saved_tree: Path) -> None:
    blank = jax.tree.map(lambda leaf: leaf if isinstance(leaf, (int, float)) else leaf * 0, make_tree() | {"key": 0})
    report = offstep.restore(blank | {"key": jax.random.key(0)}, saved_tree)
    assert_same_tree(report.tree, make_tree())
    assert report.step == 3


def test_many_arrays_of_one_kind_are_put_together_and_may_be_donated(tmp_path: Path) -> None:
    arrays = {("w", str(number)): np.full(3 + number // 300, number, np.float32) for number in range(310)}
    step = save_arrays(tmp_path, 1, arrays)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    collections: list[str] = []  # a large one would walk all of Keras, for tenths of a second
    gc.callbacks.append(lambda phase, info: collections.append(phase))
    offstep.restore({"w": {"0": jax.ShapeDtypeStruct((3,), jnp.float32)}}, step, partial="w")
    gc.callbacks.pop()
    assert collections.count("start") <= 2
    for sharding in (None, device):
        like = {
            str(number): jax.ShapeDtypeStruct((3 + number // 300,), jnp.float32, sharding=sharding)
            for number in range(310)
        }
        tree = offstep.restore({"w": like}, step).tree["w"]
        assert [float(tree[str(number)][2]) for number in range(310)] == list(range(310))
        assert {array.committed for array in tree.values()} == {sharding is not None}
        address = tree["7"].unsafe_buffer_pointer()
        raised = jax.jit(lambda array: array + 1, donate_argnums=0)(tree["7"])
        assert raised.unsafe_buffer_pointer() == address
        assert float(raised[0]) == 8.0


def test_an_abstract_tree_is_filled(saved_tree: Path) -> None:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def describe(leaf: Any) -> Any:
        is_array = isinstance(leaf, jax.Array)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device) if is_array else leaf

    restored = offstep.restore(jax.tree.map(describe, make_tree()), saved_tree / "3").tree
    assert_same_tree(restored, make_tree())
    assert restored["params"]["w"].sharding == device


def write_with_standard_checkpointer(path: Path, tree: Any) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def write_with_manager(path: Path, tree: Any) -> Path:
    with ocp.CheckpointManager(path) as manager:
        manager.save(5, args=ocp.args.StandardSave(tree))
    return path


def write_with_v1(path: Path, tree: Any) -> Path:
    v1.save(path, tree)
    return path


def write_without_ocdbt(path: Path, tree: Any) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(path, tree)
    return path


@pytest.mark.parametrize(
    "write", [write_with_standard_checkpointer, write_with_manager, write_with_v1, write_without_ocdbt]
)
def test_what_stock_orbax_wrote_is_read(write: Callable[[Path, Any], Path], tmp_path: Path) -> None:
    tree = {"a": {"w": jnp.arange(12.0).reshape(3, 4)}, "b": [jnp.int32(3), jnp.ones((5,), jnp.bfloat16)]}
    path = write(tmp_path / "stock", tree)
    assert_same_tree(offstep.restore(jax.tree.map(jnp.zeros_like, tree), path).tree, tree)


def test_a_tree_is_restored_in_part(saved_tree: Path) -> None:
    blank = {"params": {"w": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros(3, jnp.int8)}, "other": jnp.zeros(2)}
    restored = offstep.restore(blank, saved_tree, partial="params/w").tree
    assert np.asarray(restored["params"]["w"], np.float32).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert restored["params"]["b"] is blank["params"]["b"]


def test_dtypes_are_converted_on_request_only(saved_tree: Path) -> None:
    blank = {"params": {"w": jnp.zeros((2, 3), jnp.float32)}}
    with pytest.raises(StructureMismatch, match=r"params/w: the checkpoint holds bfloat16.*float32.*cast=True"):
        offstep.restore(blank, saved_tree, partial="params")
    restored = offstep.restore(blank, saved_tree, partial="params", cast=True).tree["params"]["w"]
    assert (restored.dtype, restored.tolist()) == (jnp.float32, [[0, 1, 2], [3, 4, 5]])


# --- one leaf --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["params/w", "params.w", "/params/w"])
def test_one_leaf_is_read(saved_tree: Path, name: str) -> None:
    array = offstep.read(saved_tree, name)
    assert (array.dtype, array.tolist()) == (ml_dtypes.bfloat16, [[0, 1, 2], [3, 4, 5]])


def test_a_leaf_of_a_model_needs_no_group(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    assert np.array_equal(offstep.read(saved[0], "first/kernel"), saved[1]["trainable_variables/first/kernel"])


def test_a_leaf_of_a_keras_file_is_read_by_its_path(tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "m.keras")
    assert np.array_equal(offstep.read(tmp_path / "m.keras", "layers/dense/vars/0"), model.get_layer("first").kernel)


def test_a_leaf_that_does_not_exist_is_told_with_similar_ones(saved_tree: Path) -> None:
    with pytest.raises(KeyError, match=r"has no leaf 'params/x'; similar ones: params/"):
        offstep.read(saved_tree, "params/x")


def test_reading_a_leaf_reads_little(tmp_path: Path) -> None:
    arrays: Any = {("big",): np.zeros((4, 1 << 20), np.float32), ("small",): np.arange(3.0)}
    step = save_arrays(tmp_path, 1, arrays)
    before = read_bytes()
    assert offstep.read(step, "small").tolist() == [0, 1, 2]
    assert read_bytes() - before < 1 << 20


def read_bytes() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


# --- errors ----------------------------------------------------------------------------------------------------------


def test_other_shapes_are_told_and_nothing_is_changed(stack: tuple[Path, Model]) -> None:
    model = make_stack("a", "b", width=5)
    fit(model, [], epochs=1)
    before = read_state(model)
    with pytest.raises(StructureMismatch) as caught:
        offstep.restore(model, stack[0])
    text = str(caught.value)
    assert "trainable_variables/a/kernel: the checkpoint holds float32[3, 4], expected float32[3, 5]" in text
    assert "was the layer resized?" in text
    assert "which was not changed" in text
    assert "strict=False" in text
    assert_same(read_state(model), before)


def test_a_missing_leaf_and_one_too_many_are_told(stack: tuple[Path, Model]) -> None:
    with pytest.raises(StructureMismatch, match=r"variables/c/kernel: the checkpoint does not have it(.|\n)*rename="):
        offstep.restore(make_stack("a", "b", "c"), stack[0])
    with pytest.raises(StructureMismatch, match=r"b/kernel: the checkpoint has it, the target does not"):
        offstep.restore(make_stack("a"), stack[0])


def test_strict_false_restores_what_fits_and_reports_the_rest(stack: tuple[Path, Model]) -> None:
    directory, first = stack
    model = make_stack("a", "b", "c")
    report = offstep.restore(model, directory, strict=False)
    assert np.array_equal(model.get_layer("b").kernel, first.get_layer("b").kernel)
    assert "trainable_variables/c/kernel" in report.missing
    resized = make_stack("a", "b", width=5)
    report = offstep.restore(resized, directory, strict=False)
    assert "was the layer resized?" in report.mismatched["trainable_variables/b/kernel"]


def test_another_optimizer_is_told(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    model = make_model(lambda: keras.optimizers.SGD(0.1, momentum=0.9))
    with pytest.raises(StructureMismatch, match=r"Only the optimizer differs: compile the model with the one"):
        offstep.restore(model, saved[0])
    offstep.restore(model, saved[0], partial=("trainable_variables", "non_trainable_variables"))


def test_a_model_that_is_not_built_is_refused(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    with pytest.raises(StructureMismatch, match="is not built"):
        offstep.restore(keras.Sequential([layers.Dense(2)]), saved[0])


def test_a_flipped_bit_names_the_leaf_and_changes_nothing(tmp_path: Path) -> None:
    save_model(make_model(), tmp_path)
    step = tmp_path / "7"
    flip_bit(data_file(step), 70)
    model = make_model()
    before = read_state(model)
    with pytest.raises(CheckpointDamaged, match=r"trainable_variables/first/.*checksum is wrong.*restore another"):
        offstep.restore(model, step)
    assert_same({name: array for name, array in read_state(model).items() if name in before}, before)


def test_a_damaged_newest_step_gives_way_to_the_one_before(tmp_path: Path) -> None:
    save_model(make_model(), tmp_path, epochs=2)
    flip_bit(data_file(tmp_path / "14"), 70)
    with pytest.warns(RuntimeWarning, match=r"14 is passed over: .*checksum"):
        report = offstep.restore(make_model(), tmp_path)
    assert report.step == 7


def test_a_truncated_file_is_told(tmp_path: Path) -> None:
    save_model(make_model(), tmp_path)
    path = data_file(tmp_path / "7")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointDamaged, match=r"is truncated.*restore another checkpoint"):
        offstep.restore(make_model(), tmp_path / "7")


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_a_truncated_keras_file_is_told(suffix: str, tmp_path: Path) -> None:
    model = make_model()
    path = tmp_path / f"m{suffix}"
    model.save_weights(path) if suffix == ".weights.h5" else model.save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointDamaged, match="restore another"):
        offstep.restore(model, path)


def test_a_flipped_bit_in_an_archive_is_found(tmp_path: Path) -> None:
    model = make_model()
    path = tmp_path / "m.keras"
    model.save(path)
    content = path.read_bytes()
    kernel = np.asarray(model.get_layer("first").kernel).tobytes()
    flip_bit(path, content.index(kernel) + 5)
    with pytest.raises(CheckpointDamaged, match=r"model.weights.h5 is damaged"):
        offstep.restore(model, path)


@pytest.mark.parametrize("hdf5_checksums", [False, True])
def test_a_flipped_bit_in_a_weights_file_of_ours_is_found_before_anything_changes(
    hdf5_checksums: bool, tmp_path: Path
) -> None:
    model = make_model()
    path = tmp_path / "m.weights.h5"
    fit(model, [ModelCheckpoint(path, save_weights_only=True, hdf5_checksums=hdf5_checksums)], epochs=1)
    assert offstep.restore(make_model(), path).step == 7
    content = path.read_bytes()
    kernel = np.asarray(model.get_layer("first").kernel).tobytes()
    flip_bit(path, content.index(kernel) + 5)
    other = make_model()
    before = read_state(other)
    with pytest.raises(CheckpointDamaged, match=r"model.weights.h5: expected CRC-32C .*; restore another checkpoint"):
        offstep.restore(other, path)
    assert_same(read_state(other), before)


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UnsupportedFormat, match=r"notes.txt is no checkpoint: expected a directory"):
        offstep.restore({"w": jnp.ones(1)}, tmp_path / "notes.txt")
    with pytest.raises(CheckpointNotFound, match=r"holds no valid checkpoint, only notes.txt"):
        offstep.restore({"w": jnp.ones(1)}, tmp_path)
    with pytest.raises(CheckpointNotFound, match=r"absent does not exist"):
        offstep.restore({"w": jnp.ones(1)}, tmp_path / "absent")


def test_an_empty_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="is empty: no checkpoint was committed there"):
        offstep.restore({"w": jnp.ones(1)}, tmp_path)


def test_a_newer_format_is_told(tmp_path: Path) -> None:
    step = save_arrays(tmp_path, 1, {("w",): np.ones(2)})
    (step / "offstep.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(UnsupportedFormat, match=r"format version 99.*upgrade offstep"):
        offstep.restore({"w": jnp.ones(2)}, step)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"partial": 3}, "partial must be a prefix"),
        ({"rename": ["a"]}, "rename must be a dict"),
        ({"threads": 0}, "threads must be an integer"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{text}.*Received: "):
        offstep.restore({"w": jnp.ones(2)}, tmp_path, **options)


def test_a_selection_without_leaves_is_refused(saved_tree: Path) -> None:
    with pytest.raises(StructureMismatch, match=r"partial='typo' selects no leaf of the target; it has "):
        offstep.restore(make_tree(), saved_tree, partial="typo")


def test_something_else_than_arrays_is_refused(saved_tree: Path) -> None:
    with pytest.raises(StructureMismatch, match=r"Received: object"):
        offstep.restore({"w": object()}, saved_tree)
