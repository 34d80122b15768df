"""Models of every kind, saved while they train, come back bit for bit in a process that has no offstep."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import interpreters
import jax
import keras
import numpy as np
import pytest
import zoo
from keras import layers
from runs import assert_same, fit, list_steps, make_model, read_state, read_step

from offstep import ModelCheckpoint

pytestmark = pytest.mark.usefixtures("one_writer")

Model = Any  # Keras carries no types
GROUPS = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")


@keras.saving.register_keras_serializable("roundtrip")
class Kinds(layers.Layer):
    """Variables of many types, changed by each training step."""

    def build(self, _: Any) -> None:
        self.kinds = [
            self.add_weight(shape=shape, dtype=dtype, initializer="ones", trainable=False, name=f"{dtype}_{len(shape)}")
            for dtype in ("float16", "bfloat16", "float32", "int8", "uint8", "int16", "int32", "uint32", "bool")
            for shape in ((), (3,))
        ]

    def call(self, x: Any, training: bool = False) -> Any:  # backend tensors
        if training:
            for kind in self.kinds:
                kind.assign(~kind.value if kind.dtype == "bool" else keras.ops.cast(kind.value + 3, kind.dtype))
        return x


def values(variables: Any) -> list[np.ndarray]:  # of Keras
    return [np.asarray(v.value) for v in variables]


def take_values(model: Model) -> dict[str, list[np.ndarray]]:
    groups = {group: values(getattr(model, group)) for group in GROUPS if group != "optimizer_variables"}
    return groups | {"optimizer_variables": values(model.optimizer.variables)}


def train_and_save(name: str, directory: Path) -> None:
    keras.utils.clear_session()
    model = zoo.ZOO[name]()
    saved: dict[str, Any] = {}
    recorder = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: saved.update(take_values(model)))
    with warnings.catch_warnings():  # the notes are for other tests
        warnings.simplefilter("ignore", UserWarning)
        ours = ModelCheckpoint(directory / name / "{step}", save_freq=3, max_to_keep=1)
        model.fit(*zoo.make_data(), batch_size=4, epochs=3, verbose=0, callbacks=[recorder, ours])
    saved["words"] = [layer.words for layer in zoo.find_vocabularies(model)]
    is_averaged = getattr(model.optimizer, "use_ema", False)  # then `fit` puts the averages in after the last save
    saved["prediction"] = None if is_averaged else np.asarray(model.predict(zoo.make_data()[0], verbose=0), "float32")
    (directory / f"{name}.pickle").write_bytes(pickle.dumps(saved))


def reload_without_offstep(directory: Path) -> dict[str, str]:
    tests = Path(__file__).parent
    script = tests / "reload_roots.py"
    environment = os.environ | {"PYTHONPATH": str(tests), "KERAS_BACKEND": "jax"}
    done = interpreters.run([script, directory], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return results


def find_differences(names: Iterable[str], directory: Path) -> dict[str, str]:
    """What differs from the live model, by name, when a fresh process loads what each model's training has saved."""
    for name in names:
        train_and_save(name, directory)
    return reload_without_offstep(directory)


@pytest.mark.timeout(300)
def test_models_come_back_in_a_process_without_offstep(tmp_path: Path) -> None:
    assert find_differences(zoo.SPREAD, tmp_path) == dict.fromkeys(zoo.SPREAD, "")


@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_the_other_models_of_the_zoo_do_so_too(tmp_path: Path) -> None:
    others = [name for name in zoo.ZOO if name not in zoo.SPREAD]
    assert find_differences(others, tmp_path) == dict.fromkeys(others, "")


def make_kinds() -> Model:
    keras.utils.clear_session()
    inputs = layers.Input((3,), name="inputs")
    x = layers.Dense(3, name="wide", dtype="float64")(Kinds(name="kinds")(inputs))
    model = keras.Model(inputs, layers.Dense(1, name="last", dtype="mixed_bfloat16")(x), name="kinds_model")
    model.compile("adam", "mse", metrics=["mae"])
    return model


@pytest.fixture
def float64_exists() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("float64_exists")
@pytest.mark.parametrize("options", [{}, {"in_process": True}, {"snapshot_mode": "device_copy"}], ids=str)
def test_variables_of_every_type_come_back(options: dict[str, Any], tmp_path: Path) -> None:
    model = make_kinds()
    ours = ModelCheckpoint(tmp_path / "{step}", save_freq=7, **options)
    fit(model, [ours])
    state = read_state(model)
    assert_same(read_step(tmp_path / "14"), state)
    assert {str(array.dtype) for array in state.values()} >= {"bool", "int8", "bfloat16", "float16", "float64"}
    loaded = keras.saving.load_model(tmp_path)
    weights = {path: array for path, array in state.items() if not path.startswith("metrics")}
    assert_same({path: array for path, array in read_state(loaded).items() if path in weights}, weights)


def test_load_weights_of_one_step_restores_the_same_model(tmp_path: Path) -> None:
    states: list[Any] = []
    model = make_model()
    recorder = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: states.append(read_state(model)))
    fit(model, [recorder, ModelCheckpoint(tmp_path / "{step}")], epochs=3)
    for step, state in zip((7, 14, 21), states, strict=True):
        other = make_model()
        fit(other, [], epochs=1)
        other.load_weights(tmp_path / str(step))
        assert_same(read_state(other), state)


def test_weights_only_holds_the_weights_and_load_weights_takes_them(tmp_path: Path) -> None:
    model = make_model()
    fit(model, [ModelCheckpoint(tmp_path / "{step}", save_weights_only=True)])
    other = make_model()
    other.load_weights(tmp_path / "14")
    for group in GROUPS[:2]:
        assert [v.tobytes() for v in values(getattr(other, group))] == [
            v.tobytes() for v in values(getattr(model, group))
        ]
    with pytest.raises(ValueError, match="save_weights_only=True"):
        keras.saving.load_model(tmp_path)


def test_a_loaded_model_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    whole = make_model()
    fit(whole, [], epochs=4)
    half = make_model()
    fit(half, [ModelCheckpoint(tmp_path / "{step}")], epochs=2)
    keras.utils.clear_session()
    resumed = keras.saving.load_model(tmp_path)
    fit(resumed, [ModelCheckpoint(tmp_path / "{step}")], initial_epoch=2, epochs=4)
    assert_same(read_state(resumed), read_state(whole))
    assert list_steps(tmp_path) == [7, 14, 21, 28]
    assert_same(read_step(tmp_path / "28"), read_state(whole))
