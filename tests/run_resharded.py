"""Restores a model that was saved on eight devices as ModelParallel; prints as JSON what held.

Arguments: "save" or how to distribute ("one", "data", "model"), directory. With "save" it also trains and saves.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np

import offstep

kind, directory = sys.argv[1], Path(sys.argv[2])
devices = [f"cpu:{number}" for number in range(len(jax.devices()))]


def distribute() -> Any:  # of Keras, or None
    if kind in ("save", "model"):
        mesh = keras.distribution.DeviceMesh((1, len(devices)), ["batch", "model"], devices)
        layouts = keras.distribution.LayoutMap(mesh)
        layouts[".*kernel"] = (None, "model")
        layouts[".*embeddings"] = ("model", None)
        return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    if kind == "data":
        return keras.distribution.DataParallel(devices=devices)
    return None


def make_model() -> Any:
    inputs = keras.layers.Input((8,), name="inputs")
    x = keras.layers.Embedding(64, 8, name="embed")(inputs)
    x = keras.layers.Flatten(name="flat")(x)
    x = keras.layers.Dense(16, activation="relu", name="wide")(x)
    model = keras.Model(inputs, keras.layers.Dense(8, name="last")(x), name="sharded")
    model.compile("adam", "mse")
    return model


distribution = distribute()
if distribution is not None:
    keras.distribution.set_distribution(distribution)
keras.utils.set_random_seed(1)
model = make_model()
x = np.random.default_rng(0).integers(0, 64, (16, 8)).astype("float32")
if kind == "save":
    model.fit(x, x, batch_size=8, epochs=2, verbose=0, callbacks=[offstep.ModelCheckpoint(directory / "{step}")])
    np.savez(directory / "expected.npz", *(np.asarray(v.value) for v in [*model.variables, *model.optimizer.variables]))
    print(json.dumps({"sharded": not model.get_layer("wide").kernel.value.sharding.is_fully_replicated}))
else:
    model.optimizer.build(model.trainable_variables)
    shardings = [v.value.sharding for v in [*model.variables, *model.optimizer.variables]]
    report = offstep.restore(model, directory)
    after = [v.value for v in [*model.variables, *model.optimizer.variables]]
    expected = np.load(directory / "expected.npz")
    held = {
        "values": all(np.array_equal(np.asarray(a), expected[f"arr_{n}"]) for n, a in enumerate(after)),
        "shardings": [a.sharding for a in after] == shardings,
        "names": not report.by_position and not report.missing,
    }
    model.fit(x, x, batch_size=8, epochs=1, verbose=0)  # the restored arrays serve a training step
    print(json.dumps(held))
