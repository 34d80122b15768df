"""The directory that we lay out, as stock Keras sees it."""

from __future__ import annotations

import json
import os
from base64 import urlsafe_b64decode
from dataclasses import replace
from pathlib import Path

import interpreters
import jax
import keras
import numpy as np
from slots import Tree, assert_same, flatten, lay_out, save

from offstep.formats.orbax_directory import ModelDocuments


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
    return save(root, step, *lay_out(flatten(model.get_state_tree())), ModelDocuments(serialize(model), assets))


def serialize(model: keras.Model) -> str:
    return json.dumps(keras.saving.serialize_keras_object(model))


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


ON_EIGHT_DEVICES = """
import sys, keras, numpy as np
keras.distribution.set_distribution(keras.distribution.DataParallel())
model = keras.saving.load_model(sys.argv[1])
kernel = model.get_layer("d").kernel.value
assert len(kernel.sharding.device_set) == 8, kernel.sharding
assert np.array_equal(kernel, np.load(sys.argv[2])), kernel
"""


def test_stock_keras_loads_the_model_onto_several_devices(tmp_path: Path) -> None:
    inputs = keras.Input((8,))
    model = keras.Model(inputs, keras.layers.Dense(4, name="d", use_bias=False)(inputs))
    model.compile("sgd", "mse")
    np.save(tmp_path / "kernel.npy", model.get_layer("d").kernel)
    plan, slot = lay_out(flatten(model.get_state_tree()))
    plan = replace(
        plan, empty_nodes=tuple(((group,), "Dict") for group in ("non_trainable_variables", "metrics_variables"))
    )
    save(tmp_path / "root", 1, plan, slot, ModelDocuments(serialize(model), {}))
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = interpreters.run(["-c", ON_EIGHT_DEVICES, tmp_path / "root", tmp_path / "kernel.npy"], env=environment)
    assert done.returncode == 0, done.stderr
