"""Trainings that are interrupted and started again, beside one that is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import layers
from runs import State, read_state

Model = Any  # Keras carries no types
Callback = Any
Fit = Callable[[Model, list[Callback]], Any]  # starts a training; returns its history

ROWS = 22
BATCH_ROWS = 4
BATCHES = 6  # the last one is short


class Interrupted(Exception):
    pass


class Interrupt(keras.callbacks.Callback):
    """Ends a training right before its `count`-th batch. Keras's pool stays on beside it."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = iter(range(count - 1))  # nothing that would be restored

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if next(self.left, None) is None:
            raise Interrupted


class InterruptTest(keras.callbacks.Callback):
    """Ends a training in its `count`-th validation."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = iter(range(count - 1))

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch == 0 and next(self.left, None) is None:
            raise Interrupted


class Diary(keras.callbacks.Callback):
    """Notes all that it is told. A hook on batches of its kind switches Keras's pool off."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.lines.append(f"epoch {epoch}")

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.lines.append(f"batch {batch}")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.lines.append(f"end {batch} {logs}")

    def on_test_begin(self, logs: Any = None) -> None:
        self.lines.append("test")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.lines.append(f"epoch end {epoch} {logs}")


class QuietDiary(Diary):
    """The same beside Keras's pool, without what comes on its threads."""

    on_train_batch_end = keras.callbacks.Callback.on_train_batch_end


def make_model(**compile_options: Any) -> Model:
    """Makes a model with dropout, augmentation and BatchNorm, as a fresh process would."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(3)
    inputs = x = layers.Input((3,), name="inputs")
    x = layers.GaussianNoise(0.1, name="noise")(x)
    x = layers.Dense(8, name="first")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Dropout(0.25, name="dropout")(x)
    model = keras.Model(inputs, layers.Dense(1, name="last")(x), name="small")
    options = {"optimizer": keras.optimizers.Adam(0.05), "loss": "mse", "metrics": ["mae"]} | compile_options
    model.compile(**options)
    return model


def make_data(rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(5)
    return random.normal(size=(rows, 3)).astype("float32"), random.normal(size=(rows, 1)).astype("float32")


def fit(model: Model, callbacks: list[Callback], **options: Any) -> Any:
    """Trains on shuffled arrays, with validation."""
    x, y = make_data()
    data = {"x": x, "y": y, "batch_size": BATCH_ROWS, "validation_data": make_data(6)}
    return model.fit(**({"epochs": 4, "verbose": 0} | data | options), callbacks=callbacks)


def generate() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    x, y = make_data()
    random = np.random.default_rng(11)
    while True:
        rows = random.permutation(ROWS)[:BATCH_ROWS]
        yield x[rows], y[rows]


class Shuffled(keras.utils.PyDataset):
    """Shuffles itself after each epoch, and draws from a generator of its own and from NumPy's for each batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.x, self.y = make_data()
        self.order = np.arange(ROWS)
        self.random = np.random.default_rng(2)
        self.reads = 0

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        self.reads += 1
        rows = self.order[index * BATCH_ROWS : (index + 1) * BATCH_ROWS]
        noise = self.random.normal() + np.random.normal()
        return self.x[rows] + np.float32(noise), self.y[rows]

    def on_epoch_end(self) -> None:
        np.random.shuffle(self.order)


class Plain(keras.utils.PyDataset):
    """Depends on nothing but the number of the batch."""

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        x, y = make_data()
        rows = slice(index * BATCH_ROWS, (index + 1) * BATCH_ROWS)
        return x[rows], y[rows]


@dataclass
class Outcome:
    """All that a training leaves."""

    state: State
    history: dict[str, list[float]]
    epochs: list[int]
    decisions: list[dict[str, Any]]
    attempts: int = field(compare=False, default=1)


_DECISIONS = ("wait", "best", "best_epoch", "stopped_epoch", "cooldown_counter", "lines", "count_of_epochs")


def train(
    make_callbacks: Callable[[], list[Callback]],
    interruptions: Sequence[Callback] = (),
    run: Fit = fit,
    make: Callable[[], Model] = make_model,
) -> Outcome:
    """Trains until it is finished; each of the interruptions ends one attempt, and all is made anew for the next."""
    attempts = 0
    for interruption in [*interruptions, None]:
        attempts += 1
        model, callbacks = make(), make_callbacks()
        try:
            history = run(model, [*callbacks, *([] if interruption is None else [interruption])])
        except Interrupted:
            let_go(callbacks)
        else:
            break
    return Outcome(read_state(model), history.history, history.epoch, [_decide(each) for each in callbacks], attempts)


def let_go(callbacks: Sequence[Callback]) -> None:
    """Waits for what is being saved, as the writer of a killed process would, and frees its memory."""
    for callback in callbacks:
        saver = getattr(callback, "saver", callback)
        if hasattr(saver, "wait_until_finished"):
            saver.wait_until_finished()
            saver._engine.close()


def _decide(callback: Callback) -> dict[str, Any]:
    decisions = {name: value for name, value in vars(callback).items() if name in _DECISIONS}
    weights = getattr(callback, "best_weights", None)
    return decisions | {"best_weights": None if weights is None else [array.tobytes() for array in weights]}


def assert_equal(actual: Outcome, expected: Outcome) -> None:
    assert actual.history == expected.history
    assert actual.epochs == expected.epochs
    assert actual.decisions == expected.decisions
    assert {name: array.tobytes() for name, array in actual.state.items()} == {
        name: array.tobytes() for name, array in expected.state.items()
    }
