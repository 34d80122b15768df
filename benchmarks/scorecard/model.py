"""A model whose values at every step are known beforehand.

Each gradient is an input of small whole numbers, and plain SGD with a rate of 1 subtracts it: after step n every weight
is exactly -n times its input. Whoever reads a checkpoint knows what must be in it without having trained.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Weights = dict[str, dict[str, np.ndarray]]
_PERIOD = 251  # prime, so that no chunk looks like the one before
_UNREACHABLE = -1e30  # what the model shall predict: the gradient of the mean absolute error never changes its sign


@dataclass(frozen=True)
class Shape:
    """How large the model is.

    Attributes:
        branches: Dense layers beside each other.
        width: Rows of the first one's kernel; each other one has one more than the one before.
        scale: Factor of all kernels, by which two runs differ. Up to 8 branches and a scale of 4 are exact for 16,000
            steps.
    """

    branches: int = 4
    width: int = 60_000
    scale: int = 1

    @property
    def state_bytes(self) -> int:
        """Bytes of kernels and biases."""
        return 4 * sum(self.width + number + 1 for number in range(self.branches))


def make_inputs(shape: Shape) -> list[np.ndarray]:
    """Returns one row for each branch."""
    return [
        ((np.arange(shape.width + number) % _PERIOD + 1 + number) * shape.scale).astype(np.float32)[None]
        for number in range(shape.branches)
    ]


def expect(shape: Shape, step: int) -> Weights:
    """Returns what the weights are after `step` steps."""
    return {
        f"branch_{number}": {"kernel": -step * row.T, "bias": np.full(1, -step, np.float32)}
        for number, row in enumerate(make_inputs(shape))
    }


def find_difference(weights: Weights, shape: Shape, step: int) -> str | None:
    """Says what is not as it must be after `step` steps."""
    for layer, expected in expect(shape, step).items():
        for name, array in expected.items():
            found = weights.get(layer, {}).get(name)
            if found is None:
                return f"{layer}/{name} is missing"
            if not np.array_equal(np.asarray(found), array):
                return f"{layer}/{name} is not that of step {step}"
    return None


def read_step(weights: Weights) -> int | None:
    """Returns the step that the weights say they are of; `None` where they are of none."""
    step = -float(np.asarray(weights["branch_0"]["bias"])[0])
    return int(step) if step.is_integer() else None


def make_model(shape: Shape) -> Any:  # Keras carries no types
    """Returns the compiled model, at step 0."""
    import keras

    inputs = [keras.Input((shape.width + number,), name=f"input_{number}") for number in range(shape.branches)]
    layers = [
        keras.layers.Dense(1, kernel_initializer="zeros", name=f"branch_{number}") for number in range(shape.branches)
    ]
    parts = [layer(tensor) for layer, tensor in zip(layers, inputs, strict=True)]
    outputs = keras.layers.Add(name="sum")(parts) if len(parts) > 1 else parts[0]
    model = keras.Model(inputs, outputs, name="known")
    model.compile(keras.optimizers.SGD(1.0), "mae")
    return model


def make_batches(shape: Shape, nan_from: int | None = None) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
    """Yields the one batch for ever; from the given one on it makes all weights NaN."""
    inputs, target = tuple(make_inputs(shape)), np.full((1, 1), _UNREACHABLE, np.float32)
    for number in itertools.count(1):
        if number == nan_from:
            inputs = tuple(row * math.nan for row in inputs)
        yield inputs, target


def read_weights(model: Any) -> Weights:  # Keras carries no types
    """Returns the weights of a model by layer and name."""
    return {
        layer.name: {variable.name: np.asarray(variable) for variable in layer.variables}
        for layer in model.layers
        if layer.variables
    }
