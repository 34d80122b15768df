"""Trains on eight virtual devices, saves, and says what was saved; or loads it: one process for each."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
from spread_model import list_variables, make_model

Model = Any  # Keras carries no types


def make_distribution(kind: str) -> Any:  # a distribution of Keras, or None
    devices = keras.distribution.list_devices()
    if kind in ("data", "one"):
        return keras.distribution.DataParallel(devices=devices)
    if kind.startswith("model"):
        shape = {"model": (2, 4), "model_wide": (1, 8)}[kind]
        mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), devices)
        layout = keras.distribution.LayoutMap(mesh)
        layout["wide/kernel"] = (None, "model")
        layout["wide/bias"] = ("model",)
        layout["narrow/kernel"] = ("model", None)
        return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    return None


def save(kind: str, directory: Path) -> None:
    from offstep import ModelCheckpoint

    keras.distribution.set_distribution(make_distribution(kind))
    model = make_model()
    data = np.random.default_rng(0).random((32, 8), "float32")
    recorder = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: write_expected(model, directory))
    ours = ModelCheckpoint(directory / "root" / "{step}", save_freq=2)
    files = [
        make(directory / f"{who}{suffix}", save_weights_only=suffix == ".weights.h5")
        for suffix in (".keras", ".weights.h5")
        for who, make in (("ours", ModelCheckpoint), ("stock", keras.callbacks.ModelCheckpoint))
    ]
    model.fit(data, data, batch_size=16, epochs=2, verbose=0, callbacks=[ours, *files, recorder])
    devices = {len(v.value.sharding.device_set) for v in model.trainable_variables}
    report = {"state_bytes": ours.stats[-1].state_bytes, "devices": sorted(devices)}
    (directory / "report.json").write_text(json.dumps(report))


def list_named(model: Model) -> dict[str, np.ndarray]:
    return {v.path.replace("/", "."): np.asarray(v.value) for v in list_variables(model)}


def write_expected(model: Model, directory: Path) -> None:
    np.savez(directory / "expected.npz", **list_named(model))


def load(kind: str, directory: Path) -> None:
    sys.modules["offstep"] = None  # type: ignore[assignment]  # from here on it cannot be imported
    keras.distribution.set_distribution(make_distribution(kind))
    model = load_weights(directory) if kind == "one" else keras.saving.load_model(directory / "root")
    compare(list_named(model), directory)
    kernel = model.get_layer("wide").kernel.value
    assert len(kernel.sharding.device_set) == len(jax.devices()), kernel.sharding
    if kind == "none":
        restore(directory)


def load_weights(directory: Path) -> Model:
    """On fewer devices stock `load_model` fails, also for what stock saved: it has no place for the metrics yet."""
    model = make_model()
    data = np.zeros((16, 8), "float32")
    model.fit(data, data, verbose=0)
    model.load_weights(directory / "root" / "4")
    return model


def restore(directory: Path) -> None:
    from orbax.checkpoint import v1

    tree = v1.load(directory / "root" / "4", checkpointable_name="pytree")
    wide = tree["trainable_variables"]["wide"]
    with np.load(directory / "expected.npz") as expected:
        assert np.array_equal(wide["kernel"], expected["wide.kernel"])
        assert np.array_equal(wide["bias"], expected["wide.bias"])


def compare(actual: dict[str, np.ndarray], directory: Path) -> None:
    with np.load(directory / "expected.npz") as expected:
        assert sorted(actual) == sorted(expected.files), set(actual) ^ set(expected.files)
        differing = [name for name, array in actual.items() if array.tobytes() != expected[name].tobytes()]
    assert not differing, differing


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ.setdefault("KERAS_BACKEND", "jax")
    assert len(jax.devices()) == (1 if sys.argv[2] == "one" else 8)
    {"save": save, "load": load}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
