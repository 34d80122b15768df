"""Trains on another backend of Keras with stock's callback and ours; prints as JSON what came out equal."""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras_file_reader import assert_same_files
from runs import (
    State,
    StockRecord,
    assert_same,
    fit,
    iterations,
    list_steps,
    make_data,
    make_model,
    read_state,
    read_step,
)

from offstep import BackupAndRestore, ModelCheckpoint

BACKEND = os.environ["KERAS_BACKEND"]
assert keras.backend.backend() == BACKEND != "jax"

Case = Callable[[Path], None]
cases: dict[str, Case] = {}


def case(function: Case) -> Case:
    cases[function.__name__] = function
    return function


def assert_saved(root: Path, stock: StockRecord) -> None:
    assert list_steps(root) == [iterations(state) for state in stock.states]
    for state in stock.states:
        assert_same(read_step(root / str(iterations(state))), state)


class Beside(keras.callbacks.Callback):
    """Switches Keras's asynchronous dispatch off."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        pass


def run(root: Path, save_freq: Any, wrap: Callable[[Any], Any], **options: Any) -> None:
    stock = StockRecord(save_freq=save_freq)
    fit(make_model(), [stock], **options)
    fit(make_model(), wrap(ModelCheckpoint(root / "{step}", save_freq=save_freq, slots=8)), **options)
    assert_saved(root, stock)


@case
def every_epoch(root: Path) -> None:
    run(root, "epoch", lambda ours: [ours], validation_data=make_data())


@case
def every_batch(root: Path) -> None:
    run(root, 1, lambda ours: [ours], validation_data=make_data())


@case
def every_third_batch_beside_another_callback(root: Path) -> None:
    run(root, 3, lambda ours: [ours, Beside()])


@case
def bare_every_epoch(root: Path) -> None:
    run(root, "epoch", lambda ours: ours, validation_data=make_data())


@case
def several_epochs(root: Path) -> None:
    fit(make_model(), [ModelCheckpoint(root / "{step}", save_freq="2 epochs")], epochs=5)
    assert list_steps(root) == [14, 28]


@case
def best_batches(root: Path) -> None:
    losses: list[float] = []
    recorder = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(logs["loss"]))
    ours = ModelCheckpoint(root / "{step}", "loss", save_best_only=True, save_freq=1)
    fit(make_model(), [recorder, ours], epochs=1)
    best = [number + 1 for number, loss in enumerate(losses) if loss < min(losses[:number], default=np.inf)]
    assert list_steps(root) == best


@case
def by_hand(root: Path) -> None:
    for callback in (stock := StockRecord(save_freq=2), ModelCheckpoint(root / "{step}", save_freq=2)):
        model = make_model()
        callbacks = keras.callbacks.CallbackList([callback], model=model)
        callbacks.on_train_begin()
        callbacks.on_epoch_begin(0)
        for batch in range(4):
            callbacks.on_train_batch_begin(batch)
            logs = model.train_on_batch(*make_data(2), return_dict=True)
            callbacks.on_train_batch_end(batch, logs)
        callbacks.on_train_end()
    assert_saved(root, stock)


def select_trained(state: State) -> State:
    """Returns the state without metrics and seeds, which a rebuilt model makes or names when it needs them."""
    return {name: array for name, array in state.items() if not name.startswith("metrics") and "/seed_" not in name}


@case
def stock_loads_it(root: Path) -> None:
    model = make_model()
    fit(model, [ModelCheckpoint(root / "{step}")])
    expected = model.predict(make_data()[0], verbose=0)
    loaded = keras.saving.load_model(root)
    assert np.array_equal(loaded.predict(make_data()[0], verbose=0), expected)
    assert_same(select_trained(read_state(loaded)), select_trained(read_state(model)))
    other = make_model()
    fit(other, [], epochs=1)
    other.load_weights(root / "14")
    assert np.array_equal(other.predict(make_data()[0], verbose=0), expected)


@case
def weights_of_sixteen_bits(root: Path) -> None:
    inputs = keras.layers.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(2, dtype="bfloat16", name="half")(inputs))
    model.compile("sgd", "mse")
    ours = ModelCheckpoint(root / "{step}")
    ours.set_model(model)
    ours.on_epoch_end(0, {})
    ours.on_train_end()
    state = read_step(root / "0")
    assert state["trainable_variables/half/kernel"].dtype == "bfloat16"
    assert_same(state, read_state(model))


@case
def a_large_model_is_named_as_load_model_finds_it(root: Path) -> None:
    if BACKEND != "torch":
        return  # only PyTorch can rebuild it without its arrays
    from offstep import keras_rebuild

    keras_rebuild.EAGER_REBUILD_BYTES = 1
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2), keras.layers.Dropout(0.5)])
    model.compile("adam", "mse")
    x = make_data()[0]
    model.fit(x, x[:, :2], verbose=0, callbacks=[ModelCheckpoint(root / "{step}")])
    keras.utils.clear_session()
    loaded = keras.saving.load_model(root)
    assert np.array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


@case
def files_of_keras(root: Path) -> None:
    for folder, make in (("stock", keras.callbacks.ModelCheckpoint), ("ours", ModelCheckpoint)):
        callbacks = [
            make(root / folder / "{epoch}-{val_loss:.3f}.weights.h5", save_weights_only=True),
            make(root / folder / "{epoch}-{batch}.keras", save_freq=5),
            make(root / folder / "best.keras", "loss", save_best_only=True),
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5),
        ]
        with warnings.catch_warnings(action="error", category=UserWarning):  # it is the writer that writes them
            fit(make_model(), callbacks, validation_data=make_data())
    assert_same_files(root / "ours", root / "stock")


@case
def legacy_files_of_keras(root: Path) -> None:
    for folder, make in (("stock", keras.callbacks.ModelCheckpoint), ("ours", ModelCheckpoint)):
        fit(make_model(), [make(root / folder / "{epoch}.h5")])
    assert_same_files(root / "ours", root / "stock")


@case
def resuming_is_refused(root: Path) -> None:
    for make, name in (
        (lambda: BackupAndRestore(root), "BackupAndRestore needs Keras on JAX. Received: Keras on "),
        (lambda: ModelCheckpoint(root / "{step}", resume=True), "resume=True needs Keras on JAX. Received: Keras on "),
    ):
        message = ""
        try:
            make()
        except ValueError as error:
            message = str(error)
        assert message == name + BACKEND


def judge(function: Case, root: Path) -> str:
    try:
        root.mkdir(parents=True)
        function(root)
    except Exception:  # noqa: BLE001  # the test prints it
        return traceback.format_exc()
    return "equal"


warnings.filterwarnings("ignore", "Keras itself (numbers|writes)")
print(json.dumps({name: judge(function, Path(sys.argv[1], name)) for name, function in cases.items()}))
