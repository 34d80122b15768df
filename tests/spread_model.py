"""The model of the tests that spread one over devices, or processes."""

from __future__ import annotations

from typing import Any

import keras

Model = Any  # Keras carries no types


def make_model() -> Model:
    keras.utils.set_random_seed(1)
    inputs = keras.layers.Input((8,), name="inputs")
    x = keras.layers.Dense(64, name="wide")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Dropout(0.1, name="dropout")(x)
    model = keras.Model(inputs, keras.layers.Dense(8, name="narrow")(x), name="spread")
    model.compile("adam", "mse", metrics=["mae"])
    return model


def list_variables(model: Model) -> list[Any]:
    return [*model.trainable_variables, *model.non_trainable_variables, *model.optimizer.variables]
