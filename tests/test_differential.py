"""Random trainings through stock's callback and ours: same files, same messages, same best, same errors."""

from __future__ import annotations

import io
import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras_file_reader import read_file
from runs import read_step

from offstep import ModelCheckpoint

pytestmark = pytest.mark.usefixtures("one_writer")

Model = Any  # Keras carries no types
Logs = dict[str, Any]  # numbers and arrays

FINISHED = "finished saving model"


@dataclass(frozen=True)
class Epoch:
    """What one epoch reports: the logs of each execution of batches, then its own."""

    batches: tuple[Logs, ...]
    logs: Logs


@dataclass(frozen=True)
class Training:
    """One example."""

    options: dict[str, Any]  # arguments of Keras
    template: str
    steps_per_execution: int
    epochs: tuple[Epoch, ...]
    driver: str


@dataclass
class Outcome:
    """What one callback did."""

    files: dict[str, float]
    decisions: list[str]
    finished: list[str]
    warned: list[str]
    error: str
    best: float | None


VALUES = st.one_of(
    st.sampled_from([0.5, 0.25, 1.0, 2, -1.0, 0.1, 0.1 + 1e-9]),
    st.sampled_from([0.1, 0.5, 3.0]).map(np.float32),
    st.sampled_from([0.5, 1.0]).map(np.array),
    st.floats(-1e6, 1e6, width=32),
)
ODD_VALUES = st.one_of(VALUES, st.just(np.array([1.0, 2.0])), st.none())


@st.composite
def make_logs(draw: Any) -> Logs:
    logs: Logs = {"loss": draw(VALUES)}
    if draw(st.booleans()):
        logs["val_loss"] = draw(ODD_VALUES)
    if draw(st.booleans()):
        logs["score"] = draw(VALUES)
    return logs


@st.composite
def make_training(draw: Any) -> Training:
    monitor, mode = draw(
        st.sampled_from(
            [("loss", "auto"), ("val_loss", "auto"), ("val_loss", "min"), ("score", "max"), ("loss", "max")]
        )
    )
    save_freq = draw(st.sampled_from(["epoch", "epoch", 1, 2, 3, 5]))
    options = {
        "monitor": monitor,
        "mode": mode,
        "verbose": draw(st.sampled_from([1, 1, 0])),
        "save_best_only": draw(st.booleans()),
        "save_freq": save_freq,
        "initial_value_threshold": draw(st.sampled_from([None, None, 0.5, 0.1])),
    }
    templates = ["best", "{epoch:03d}", "{epoch}-{loss:.2f}", "{epoch:02d}-{val_loss:.4f}", "of {epoch}/m-{loss:+.1e}"]
    if save_freq != "epoch":
        templates += ["{epoch:02d}-{batch:03d}", "{batch}"]
    epochs = draw(
        st.lists(st.builds(Epoch, st.lists(make_logs(), max_size=4).map(tuple), make_logs()), min_size=1, max_size=4)
    )
    return Training(
        options=options,
        template=draw(st.sampled_from(templates)),
        steps_per_execution=draw(st.sampled_from([1, 1, 2, 3])),
        epochs=tuple(epochs),
        driver=draw(st.sampled_from(["hooks", "list", "asynchronous list"])),
    )


@cache
def get_model(steps_per_execution: int) -> Model:
    inputs = keras.layers.Input((1,))
    model = keras.Model(inputs, keras.layers.Dense(1, name="only")(inputs))
    model.compile("sgd", "mse", steps_per_execution=steps_per_execution)
    return model


class Synchronous(keras.callbacks.Callback):
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        pass


def make_driver(training: Training, callback: Any, model: Model) -> Any:  # with the hooks of a callback
    if training.driver == "hooks":
        callback.set_model(model)
        return callback
    others = [Synchronous()] if training.driver == "list" else []
    return keras.callbacks.CallbackList([*others, callback], model=model)


def drive(training: Training, driver: Any, model: Model) -> None:
    """Trains: each execution of batches leaves its number in the model."""
    kernel, done = model.get_layer("only").kernel, 0
    kernel.assign([[0.0]])  # the model is shared: an epoch without batches would save what the last example left
    driver.on_train_begin()
    for number, epoch in enumerate(training.epochs):
        driver.on_epoch_begin(number)
        for i, logs in enumerate(epoch.batches):
            driver.on_train_batch_begin(i * training.steps_per_execution)
            kernel.assign([[float(done := done + 1)]])
            driver.on_train_batch_end((i + 1) * training.steps_per_execution - 1, dict(logs))
        driver.on_epoch_end(number, dict(epoch.logs))
    driver.on_train_end({})


@contextmanager
def recorded() -> Iterator[tuple[io.StringIO, list[warnings.WarningMessage]]]:
    with redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield printed, warned


def observe(training: Training, callback: Any, root: Path) -> Outcome:
    model = get_model(training.steps_per_execution)
    driver = make_driver(training, callback, model)
    error = ""
    with recorded() as (printed, warned):
        try:
            drive(training, driver, model)
        except (KeyError, TypeError, ValueError) as raised:
            error = f"{type(raised).__name__}: {raised}"
            callback.on_train_end()
    lines = [line.replace(str(root), "") for line in printed.getvalue().splitlines() if line]
    return Outcome(
        files=read_files(root),
        decisions=[line for line in lines if FINISHED not in line],
        finished=[line for line in lines if FINISHED in line],
        warned=[str(warning.message) for warning in warned if warning.category is UserWarning],
        error=name_error(error.replace(str(root), "")),
        best=None if callback.best is None else float(callback.best),
    )


def name_error(text: str) -> str:
    """Returns the text, or what both say differently of a value that is no number (docs/differences.md)."""
    if re.match("TypeError: unsupported format string|ValueError: Failed to format this callback filepath", text):
        return "a field is no number"
    return text


def read_files(root: Path) -> dict[str, float]:
    """Returns what lies on the disk: name of the checkpoint → the number that the model held."""
    found = {}
    for path in root.rglob("*.*"):
        if path.name.endswith((".weights.h5", ".keras")):
            name, number = str(path.relative_to(root)), read_number(path)
            found[name.removesuffix(".weights.h5").removesuffix(".keras")] = number
    for path in root.rglob("offstep.json"):
        assert json.loads(path.read_text())
        kernel = read_step(path.parent)["trainable_variables/only/kernel"]
        found[str(path.parent.parent.relative_to(root))] = float(kernel[0, 0])
    return found


def read_number(path: Path) -> float:
    contents = read_file(path)
    weights = contents["model.weights.h5"] if path.suffix == ".keras" else contents
    return float(np.frombuffer(weights["layers/dense/vars/0"][2], "float32")[0])


def make_stock(training: Training, root: Path, suffix: str) -> Any:  # stock's callback
    suffix = suffix or ".weights.h5"
    options = training.options | {"save_weights_only": suffix == ".weights.h5"}
    stock = keras.callbacks.ModelCheckpoint(f"{root}/{training.template}{suffix}", **options)
    if training.options["save_freq"] != "epoch" and training.options["save_best_only"]:
        # Stock fails at the first batch of the first epoch; ours does not (docs/differences.md).
        stock.set_model(get_model(training.steps_per_execution))
        stock._set_monitor_op()
        stock._set_monitor_op = lambda: None
    return stock


def make_ours(training: Training, root: Path, suffix: str) -> ModelCheckpoint:
    filepath = f"{root}/{training.template}{suffix}"
    return ModelCheckpoint(filepath, **training.options, save_weights_only=suffix != ".keras", in_process=True, slots=4)


def assert_alike(training: Training, suffix: str, root: Path) -> None:
    stock = observe(training, make_stock(training, root / "stock", suffix), root / "stock")
    ours = observe(training, make_ours(training, root / "ours", suffix), root / "ours")
    if suffix == "":
        stock.decisions = [line.replace(".weights.h5", "") for line in stock.decisions]
        stock.finished = [line.replace(".weights.h5", "") for line in stock.finished]
        stock.error = stock.error.replace(".weights.h5", "")
    assert ours == stock


SUFFIXES = ["", ".weights.h5", ".keras"]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(training=make_training())
def test_random_trainings_leave_what_stock_leaves(suffix: str, training: Training) -> None:
    with tempfile.TemporaryDirectory() as root:
        assert_alike(training, suffix, Path(root))


@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(training=make_training())
def test_a_thousand_random_trainings_leave_what_stock_leaves(suffix: str, training: Training) -> None:
    with tempfile.TemporaryDirectory() as root:
        assert_alike(training, suffix, Path(root))
