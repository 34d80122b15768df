"""Prints the names of one model's state without distribution, with data and with model parallelism, as JSON."""

from __future__ import annotations

import json

import jax
import keras
import numpy as np
from keras import layers

from offstep.keras_names import describe_state


def name_leaves() -> list[tuple[str, ...]]:
    keras.utils.clear_session()
    model = keras.Sequential([layers.Dense(8), layers.Dropout(0.1), layers.Dense(8)])
    model.compile("adam", "mse")
    x = np.zeros((16, 8), "float32")
    model.fit(x, x, batch_size=8, verbose=0)
    return list(describe_state(model).paths)


def main() -> None:
    devices = jax.devices()
    mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*kernel"] = (None, "model")
    names = [name_leaves()]
    for distribution in (
        keras.distribution.DataParallel(devices=devices),
        keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"),
    ):
        keras.distribution.set_distribution(distribution)
        names.append(name_leaves())
        keras.distribution.set_distribution(None)
    print(json.dumps(names))


main()
