"""Small training runs, what stock `ModelCheckpoint` would have saved in them, and what lies on the disk after ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers
from orbax.checkpoint import v1 as ocp

Model = Any  # Keras carries no types
State = dict[str, np.ndarray]

WIDTH = 3
ROWS = 14
BATCH_ROWS = 2
BATCHES = ROWS // BATCH_ROWS


def make_model(make_optimizer: Callable[[], Any] | None = None, **compile_options: Any) -> Model:  # what Keras takes
    """Makes a small model with every group of state; all names are given, so that they are those of a fresh process."""
    keras.utils.clear_session()  # Keras numbers seed generators over the whole process
    keras.utils.set_random_seed(3)
    inputs = x = layers.Input((WIDTH,), name="inputs")
    x = layers.Dense(4, name="first")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Dropout(0.25, name="dropout")(x)
    model = keras.Model(inputs, layers.Dense(1, name="last")(x), name="small")
    optimizer = make_optimizer() if make_optimizer else keras.optimizers.Adam(0.05)
    model.compile(optimizer, "mse", metrics=["mae"], **compile_options)
    return model


def make_data(rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(5)
    return random.normal(size=(rows, WIDTH)).astype("float32"), random.normal(size=(rows, 1)).astype("float32")


def generate_batches(count: int = BATCHES) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches without saying how many there are."""
    x, y = make_data()
    for number in range(count):
        rows = slice(number % BATCHES * BATCH_ROWS, (number % BATCHES + 1) * BATCH_ROWS)
        yield x[rows], y[rows]


def fit(model: Model, callbacks: Any, **options: Any) -> Any:  # what Keras takes; its history
    data = {"x": make_data()[0], "y": make_data()[1], "batch_size": BATCH_ROWS} if "x" not in options else {}
    return model.fit(**({"epochs": 2, "verbose": 0, "shuffle": False} | data | options), callbacks=callbacks)


def read_state(model: Model) -> State:
    """Returns copies of the values of all variables of a model that is not within a training step."""
    return flatten(model.get_state_tree(value_format="numpy_array"))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> State:
    state: State = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        state |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: np.array(value)}
    return state


def read_step(step: Path) -> State:
    """Restores a checkpoint with stock Orbax."""
    return flatten(ocp.load(step, checkpointable_name="pytree"))


def list_steps(root: Path) -> list[int]:
    return sorted(int(path.name) for path in root.iterdir() if path.name != ".offstep-lock")  # a run's, while it lives


def assert_same(actual: State, expected: State) -> None:
    assert set(actual) == set(expected), set(actual) ^ set(expected)
    differing = [path for path, array in expected.items() if actual[path].tobytes() != array.tobytes()]
    assert not differing, differing
    assert {path: array.dtype for path, array in actual.items()} == {
        path: array.dtype for path, array in expected.items()
    }


def iterations(state: State) -> int:
    return int(next(value for path, value in state.items() if path.endswith("/iteration")))


class StockRecord(keras.callbacks.ModelCheckpoint):
    """Stock's callback, which keeps the state in memory at the moments when stock writes a file."""

    def __init__(self, **options: Any) -> None:
        suffix = "weights.h5" if options.get("save_weights_only") else "keras"
        super().__init__(f"unused.{suffix}", **options)
        self.states: list[State] = []
        self.moments: list[tuple[int, int | None]] = []

    def _save_model(self, epoch: int, batch: int | None, logs: Mapping[str, Any] | None) -> None:
        if self._should_save_model(epoch, batch, logs, self.filepath):
            self.states.append(read_state(self.model))
            self.moments.append((epoch, batch))
