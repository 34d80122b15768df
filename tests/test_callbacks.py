"""The callback against stock `ModelCheckpoint` in real runs of Keras: same moments, same states, same words."""

from __future__ import annotations

import copy
import errno
import gc
import json
import pickle
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from processes import count_slots, wait_until
from runs import (
    BATCHES,
    StockRecord,
    assert_same,
    fit,
    generate_batches,
    iterations,
    list_steps,
    make_data,
    make_model,
    read_state,
    read_step,
)

from offstep import BudgetExceeded, ModelCheckpoint, SaveFailed, catalog

Model = Any  # Keras carries no types
Options = dict[str, Any]  # arguments of Keras


pytestmark = pytest.mark.usefixtures("one_writer")


class Idle(keras.callbacks.Callback):
    """Switches Keras's asynchronous dispatch off, as most callbacks with a batch hook do."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        pass


class StopAt(keras.callbacks.Callback):
    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch == self.batch:
            self.model.stop_training = True


class WarmUp(keras.callbacks.Callback):
    """A schedule that sets the learning rate before each batch, and so attaches the state to the model."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.optimizer.learning_rate = 0.01 / (batch + 1)


def beside_nothing(callback: Any, others: list[Any]) -> Any:
    return [*others, callback]


def beside_a_synchronous_one(callback: Any, others: list[Any]) -> Any:
    return [*others, callback, Idle()]


def bare(callback: Any, others: list[Any]) -> Any:
    return [*others, callback] if others else callback


DISPATCHES = (beside_nothing, beside_a_synchronous_one, bare)
SYNCHRONOUS = (
    "plain",
    "remainder of an execution",
    "generator with validation",
    "stopped",
    "warm-up",
    "early stopping",
)
LIKE_OTHERS = ("generator in executions", "later epochs", "averages at the end of epochs")  # after each batch
COUNTED = ("plain", "remainder of an execution", "generator of unknown size", "data that ends early", "later epochs")


def make_averaging() -> Any:  # an optimizer of Keras
    return keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.5)


# name -> (options of compile, options of fit, other callbacks before ours)
RUNS: dict[str, tuple[Options, Callable[[], Options], Callable[[], list[Any]]]] = {
    "plain": ({}, dict, list),
    "remainder of an execution": ({"steps_per_execution": 3}, dict, list),
    "generator of unknown size": ({}, lambda: {"x": generate_batches(), "epochs": 1}, list),
    "generator in executions": (
        {"steps_per_execution": 3},
        lambda: {"x": generate_batches(), "epochs": 1, "validation_data": make_data()},
        list,
    ),
    "generator with validation": (
        {},
        lambda: {"x": generate_batches(), "epochs": 1, "validation_data": make_data()},
        list,
    ),
    "data that ends early": (
        {},
        lambda: {"x": generate_batches(8), "steps_per_epoch": 5, "validation_data": make_data()},
        list,
    ),
    "validation": ({}, lambda: {"validation_data": make_data()}, list),
    "later epochs": ({}, lambda: {"initial_epoch": 3, "epochs": 5}, list),
    "stopped": ({}, lambda: {"validation_data": make_data()}, lambda: [StopAt(4)]),
    "eager": ({"run_eagerly": True}, lambda: {"epochs": 1}, list),
    "warm-up": ({}, dict, lambda: [WarmUp()]),
    "rate on plateau": (
        {},
        lambda: {"epochs": 3},
        lambda: [keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=9.0, cooldown=0)],
    ),
    "early stopping": (
        {},
        lambda: {"epochs": 4, "validation_data": make_data()},
        lambda: [keras.callbacks.EarlyStopping("val_loss", min_delta=9.0, restore_best_weights=True)],
    ),
    "averages in validation": (
        {"make_optimizer": make_averaging},
        lambda: {"validation_data": make_data()},
        lambda: [keras.callbacks.SwapEMAWeights()],
    ),
    "averages at the end of epochs": (
        {"make_optimizer": make_averaging},
        dict,
        lambda: [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)],
    ),
}


@cache
def record_stock(run: str, save_freq: Any) -> StockRecord:  # what Keras takes
    compile_options, fit_options, others = RUNS[run]
    stock = StockRecord(save_freq=save_freq)
    fit(make_model(**compile_options), [*others(), stock], **fit_options())
    return stock


def list_cases() -> list[Any]:  # of pytest
    cases = []
    for run, save_freq, dispatch in product(RUNS, ("epoch", 1, 3), DISPATCHES):
        if save_freq == 3 and run not in COUNTED:
            continue
        if dispatch is bare and (save_freq == "epoch" or run != "plain"):
            continue  # nothing else than beside_nothing
        # Saves of epochs are made in the same hook whatever the dispatch.
        singular = {"epoch": ("plain", "stopped"), 1: SYNCHRONOUS, 3: ("plain", "remainder of an execution")}
        is_double = dispatch is beside_a_synchronous_one and run not in singular[save_freq]
        is_double |= save_freq == 1 and run in (
            "generator in executions",
            "later epochs",
            "averages at the end of epochs",
        )
        marks = [pytest.mark.campaign] if is_double else []
        cases.append(pytest.param(run, save_freq, dispatch, id=f"{run}-{save_freq}-{dispatch.__name__}", marks=marks))
    return cases


@pytest.mark.filterwarnings("ignore:.*ran out of data.*:UserWarning")
@pytest.mark.parametrize(("run", "save_freq", "dispatch"), list_cases())
def test_saves_the_states_that_stock_saves(
    run: str, save_freq: Any, dispatch: Callable[[Any, list[Any]], Any], tmp_path: Path
) -> None:
    stock = record_stock(run, save_freq)
    compile_options, fit_options, others = RUNS[run]
    ours = ModelCheckpoint(tmp_path / "{step}", save_freq=save_freq, slots=8)
    fit(make_model(**compile_options), dispatch(ours, others()), **fit_options())
    assert list_steps(tmp_path) == [iterations(state) for state in stock.states]
    for state in stock.states:
        assert_same(read_step(tmp_path / str(iterations(state))), state)
    assert [stats.step for stats in ours.stats] == list_steps(tmp_path)


# ------------------------------------------------------------------------------------------------ driven by hand


def train_by_hand(model: Model, callbacks: Any, batches: int = 4, epochs: int = 2) -> None:  # a CallbackList
    x, y = make_data()
    callbacks.on_train_begin()
    for epoch in range(epochs):
        callbacks.on_epoch_begin(epoch)
        for batch in range(batches):
            callbacks.on_train_batch_begin(batch)
            logs = model.train_on_batch(x[batch : batch + 2], y[batch : batch + 2], return_dict=True)
            model.get_layer("last").bias.assign([float(batch)])  # as a loop does that clips weights
            callbacks.on_train_batch_end(batch, logs)
        callbacks.on_epoch_end(epoch, logs)
    callbacks.on_train_end(logs)


@pytest.mark.parametrize("others", [[], [Idle()]], ids=["asynchronous", "synchronous"])
def test_a_loop_by_hand_saves_what_stock_saves(others: list[Any], tmp_path: Path) -> None:
    stock, ours = StockRecord(save_freq=3), ModelCheckpoint(tmp_path / "{step}", save_freq=3)
    train_by_hand(model := make_model(), keras.callbacks.CallbackList([stock], model=model))
    train_by_hand(model := make_model(), keras.callbacks.CallbackList([ours, *others], model=model))
    assert list_steps(tmp_path) == [3, 6]
    for state in stock.states:
        assert_same(read_step(tmp_path / str(iterations(state))), state)


def test_a_loop_by_hand_that_only_begins_and_ends_batches_saves_its_last_one(tmp_path: Path) -> None:
    model = make_model()
    callbacks = keras.callbacks.CallbackList([ModelCheckpoint(tmp_path / "{step}", save_freq=2)], model=model)
    callbacks.on_train_begin()
    for batch in range(4):
        callbacks.on_train_batch_begin(batch)
        model.train_on_batch(*make_data(2))
        callbacks.on_train_batch_end(batch)
    callbacks.on_train_end()
    assert list_steps(tmp_path) == [2, 4]


def test_a_list_that_never_begins_a_batch_is_refused(tmp_path: Path) -> None:
    model = make_model()
    callbacks = keras.callbacks.CallbackList([ModelCheckpoint(tmp_path / "{step}", save_freq=1)], model=model)
    callbacks.on_train_begin()
    callbacks.on_epoch_begin(0)
    callbacks.on_train_batch_end(0, {})
    with pytest.raises(RuntimeError, match="on_train_batch_end came without on_train_batch_begin"):
        callbacks.on_epoch_end(0, {})
    callbacks.callbacks[0].on_train_end()
    callbacks._on_end()


@pytest.mark.parametrize("is_weights_only", [False, True])
def test_hooks_called_without_any_beginning_save(is_weights_only: bool, tmp_path: Path) -> None:
    model = make_model()
    fit(model, [], epochs=1)
    ours = ModelCheckpoint(tmp_path / "deep" / "{step}", save_freq=1, save_weights_only=is_weights_only)
    ours.set_model(model)
    for batch in (0, 1, 0):  # the last one is that of another epoch
        model.train_on_batch(*make_data(2))
        ours.on_train_batch_end(batch, {})
    expected = read_state(model)
    ours.on_train_end()
    assert list_steps(tmp_path / "deep") == [8, 9, 10]
    if is_weights_only:
        expected = {path: array for path, array in expected.items() if "trainable_variables" in path.split("/")[0]}
    assert_same(read_step(tmp_path / "deep" / "10"), expected)


def test_a_model_that_was_never_compiled_is_saved(tmp_path: Path) -> None:
    model = make_model()
    model = keras.Model(model.inputs, model.outputs)
    ours = ModelCheckpoint(tmp_path / "{step}", save_freq=1)
    ours.set_model(model)
    with pytest.warns(UserWarning, match="it has no optimizer, and load_model needs one"):
        ours.on_train_begin()
    ours.on_train_batch_end(0, {})
    ours.on_train_end()
    state = read_step(tmp_path / "1")
    assert np.array_equal(state["trainable_variables/first/kernel"], model.get_layer("first").kernel)


def test_a_list_may_begin_before_the_model_is_built(tmp_path: Path) -> None:
    model = keras.Sequential([keras.layers.Dense(2, name="only")], name="late")
    model.compile("sgd", "mse")
    callbacks = keras.callbacks.CallbackList([ModelCheckpoint(tmp_path / "{step}", save_freq=1)], model=model)
    callbacks.on_train_begin()
    for batch in range(2):
        callbacks.on_train_batch_begin(batch)
        model.train_on_batch(*make_data(2))
        callbacks.on_train_batch_end(batch)
    callbacks.on_train_end()
    assert list_steps(tmp_path) == [1, 2]
    loaded = keras.saving.load_model(tmp_path)
    assert np.array_equal(loaded.get_layer("only").kernel, model.get_layer("only").kernel)


# ------------------------------------------------------------------------------------------------ dispatch


class Spy(keras.callbacks.Callback):
    """Notes whether the state was attached to the model between two batches."""

    async_safe = True

    def __init__(self) -> None:
        super().__init__()
        self.attached: set[bool] = set()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch > 0:
            self.attached.add(self._model._jax_state_synced)


@pytest.mark.parametrize("options", [{}, {"save_freq": 10_000}, {"save_freq": 2}], ids=str)
def test_the_model_stays_detached_between_batches(options: Options, tmp_path: Path) -> None:
    spy = Spy()
    fit(make_model(), [ModelCheckpoint(tmp_path / "{step}", **options), spy])
    assert spy.attached == {False}


def test_callbacks_stay_asynchronous_beside_ours(tmp_path: Path) -> None:
    ours = ModelCheckpoint(tmp_path / "{step}", save_freq=1, save_best_only=True, monitor="loss")
    assert keras.callbacks.CallbackList([ours])._async_train


def test_logs_that_never_come_are_an_error_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(keras.callbacks.Callback):
        async_safe = True

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            raise OSError("the dashboard is down")

    monkeypatch.setattr("offstep.batches.LOGS_TIMEOUT_SECONDS", 0.1)
    ours = ModelCheckpoint(tmp_path / "{step}", save_freq=1, save_best_only=True, monitor="loss")
    with pytest.raises((RuntimeError, OSError), match=r"logs of batch 0 did not come|dashboard"):
        fit(make_model(), [Failing(), ours])
    ours.on_train_end()


def test_two_of_ours_in_one_fit_do_not_meet(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "a/{step}", save_freq=2)
    second = ModelCheckpoint(tmp_path / "b/{step}", save_weights_only=True)
    model = make_model()
    fit(model, [first, second])
    assert list_steps(tmp_path / "a") == [2, 4, 6, 8, 10, 12, 14]
    assert list_steps(tmp_path / "b") == [7, 14]
    weights = {path: array for path, array in read_state(model).items() if "trainable" in path.split("/")[0]}
    assert_same(read_step(tmp_path / "b/14"), weights)
    assert_same(read_step(tmp_path / "a/14"), read_state(model))


# ------------------------------------------------------------------------------------------------ several fits


def test_batches_are_counted_on_in_a_second_fit(tmp_path: Path) -> None:
    stock, ours = StockRecord(save_freq=4), ModelCheckpoint(tmp_path / "{step}", save_freq=4)
    model = make_model()
    for _ in range(2):
        fit(model, [stock, ours], epochs=1)
    assert list_steps(tmp_path) == [iterations(state) for state in stock.states] == [4, 8, 12]


@pytest.mark.parametrize("is_weights_only", [False, True])
@pytest.mark.parametrize("executions", [1, 3])
def test_steps_go_on_where_a_resumed_model_stands(executions: int, is_weights_only: bool, tmp_path: Path) -> None:
    model = make_model(steps_per_execution=executions)
    for _ in range(2):
        ours = ModelCheckpoint(tmp_path / "{step}", save_freq=BATCHES, save_weights_only=is_weights_only)
        fit(model, ours, epochs=1)
    assert list_steps(tmp_path) == [7, 14]


def test_a_layer_that_is_frozen_between_fits_is_saved_as_such(tmp_path: Path) -> None:
    model, ours = make_model(), ModelCheckpoint(tmp_path / "{step}")
    fit(model, [ours], epochs=1)
    model.get_layer("first").trainable = False
    model.compile("sgd", "mse")
    fit(model, [ours], epochs=1)
    loaded = make_model()
    loaded.get_layer("first").trainable = False
    loaded.compile("sgd", "mse")
    assert list_steps(tmp_path) == [7]  # a new optimizer counts anew
    fit(loaded, [], epochs=1)
    loaded.load_weights(tmp_path / "7")
    assert_same(read_state(loaded), read_state(model))


def test_another_model_may_be_trained_with_the_same_callback(tmp_path: Path) -> None:
    ours = ModelCheckpoint(tmp_path / "{step}")
    fit(make_model(), [ours])
    inputs = keras.layers.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(1, name="other")(inputs))
    model.compile("sgd", "mse")
    fit(model, [ours], epochs=1)
    assert list_steps(tmp_path) == [7, 14]
    state = read_step(tmp_path / "7")
    assert "trainable_variables/other/kernel" in state
    assert "trainable_variables/first/kernel" not in state


def test_what_was_saved_before_an_exception_becomes_durable_and_a_later_fit_works(tmp_path: Path) -> None:
    class Broken(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if batch == 5:
                raise ZeroDivisionError("a bug of the user")

    ours, model = ModelCheckpoint(tmp_path / "{step}", save_freq=2), make_model()
    with pytest.raises(ZeroDivisionError):
        fit(model, [ours, Broken()])
    ours.wait_until_finished()
    assert list_steps(tmp_path) == [2, 4]
    fit(model, [ours], epochs=1)
    assert list_steps(tmp_path) == [2, 4, 6, 8, 10, 12]


def test_fits_that_end_in_exceptions_leave_no_slots_to_those_that_follow(tmp_path: Path) -> None:
    """Once the engine kept its callback, and the slots of every such fit, to the end of the process."""

    class Broken(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if batch == 3:
                raise ZeroDivisionError("a bug of the user")

    model = make_model()
    most = 0
    for number in range(10):
        with suppress(ZeroDivisionError):
            fit(model, [ModelCheckpoint(tmp_path / f"run{number}/{{step}}", save_freq=1), Broken()])
        most = max(most, count_slots())
        wait_until(lambda root=tmp_path / f"run{number}": len(catalog.list_steps(root)) == 3)
    assert 0 < most <= 6  # two for each: in use, gone, and reported but not yet freed
    gc.collect()  # an exception holds what it went through, in cycles
    fit(model, [ModelCheckpoint(tmp_path / "last/{step}")], epochs=1)
    assert count_slots() == 0


def test_a_callback_can_be_copied_before_and_after_it_was_used(tmp_path: Path) -> None:
    ours = ModelCheckpoint(tmp_path / "{step}", save_freq=3)
    first, second = copy.deepcopy(ours), copy.deepcopy(ours)  # as a tuner does for each trial
    fit(make_model(), [first], epochs=1)
    assert list_steps(tmp_path) == [3, 6]
    fit(make_model(), [second], epochs=1)
    assert second.counts.durable == 2
    third = copy.deepcopy(second)
    fit(make_model(), [third], epochs=2)
    assert second.counts.durable == 2  # a copy has a count of its own
    assert third.counts.durable == third.counts.requested > 2


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda used: pickle.loads(pickle.dumps(used))])
@pytest.mark.parametrize("name", ["{step}", "{epoch}.keras"])
def test_a_copy_of_a_used_callback_saves_for_itself(name: str, make_copy: Callable[[Any], Any], tmp_path: Path) -> None:
    ours = ModelCheckpoint(tmp_path / name, max_to_keep=1)
    fit(make_model(), [ours])
    copied = make_copy(ours)
    copied.filepath = tmp_path / "copy" / name
    fit(make_model(), [copied], epochs=3)
    assert (ours.counts.durable, copied.counts.durable) == (2, 3)
    own = make_copy(copied)  # of one that has files to keep
    fit(make_model(), [own], epochs=1)
    assert own.counts.durable == 1


# ------------------------------------------------------------------------------------------------ decisions


class Report(keras.callbacks.Callback):
    """Puts values of its own into the logs of epochs."""

    def __init__(self, **values: Any) -> None:
        super().__init__()
        self.values = values

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs |= {name: value[epoch] for name, value in self.values.items()}


FINISHED = "finished saving model"


def split_lines(text: str) -> tuple[list[str], list[str]]:
    """Returns what was decided, in order, and what became durable."""
    lines = [line for line in text.splitlines() if line.startswith("Epoch")]
    return [line for line in lines if FINISHED not in line], [line for line in lines if FINISHED in line]


DECISIONS: dict[str, tuple[Options, list[Any]]] = {
    "min": ({"mode": "min"}, [3.0, 4.0, 2.0, 2.0, 1.0]),
    "max": ({"mode": "max"}, [3.0, 4.0, 2.0, 4.0, 5.0]),
    "auto": ({"monitor": "loss"}, [3.0, 4.0, 2.0, 2.0, 1.0]),
    "threshold to beat": ({"mode": "min", "initial_value_threshold": 2.5}, [3.0, 2.5, 2.0, 2.0, 1.0]),
    "threshold of less than a float32 away": (
        {"mode": "max", "initial_value_threshold": 0.1},
        [float(np.float32(0.1)), 0.1 + 1e-9, 0.2, 0.2 + 1e-9, 0.3],
    ),
    "not a scalar": ({"mode": "min"}, [np.array([1.0, 2.0])] * 5),
    "missing": ({"mode": "min", "monitor": "val_mae"}, [1.0] * 5),
    "everything": ({"save_best_only": False, "monitor": "loss"}, [1.0] * 5),
}


@pytest.mark.filterwarnings("ignore:Can save best model only:UserWarning")
@pytest.mark.parametrize("case", DECISIONS)
def test_decides_and_says_what_stock_does(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, values = DECISIONS[case]
    options = {"monitor": "score", "save_best_only": True, "verbose": 1} | options
    report = Report(**{options["monitor"] if case != "missing" else "other": values})
    template = str(tmp_path / "{}" / "{{epoch:02d}}")
    stock = keras.callbacks.ModelCheckpoint(template.format("stock") + ".keras", **options)
    model = make_model()
    fit(model, [report, stock], epochs=5)
    decided, finished = split_lines(capsys.readouterr().out)
    ours = ModelCheckpoint(template.format("ours"), **options)
    fit(model, [report, ours], epochs=5)
    our_decided, our_finished = split_lines(capsys.readouterr().out)
    told = [line.replace("stock", "ours").replace(".keras", "") for line in decided]
    assert our_decided == told
    assert our_finished == [line.replace("stock", "ours").replace(".keras", "") for line in finished]
    assert [path.stem for path in sorted((tmp_path / "ours").iterdir())] == [
        path.stem for path in sorted((tmp_path / "stock").iterdir())
    ]
    assert (ours.best is None) == (stock.best is None)
    assert ours.best is None or float(ours.best) == float(stock.best)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("missing", None, "Can save best model only with score available."),
        (
            "array",
            np.array([1.0, 2.0]),
            r"Can save best model only when `monitor` is a scalar value. Received: \[1. 2.\]",
        ),
    ],
)
def test_a_metric_that_cannot_decide_warns_and_saves(name: str, value: Any, text: str, tmp_path: Path) -> None:
    ours = ModelCheckpoint(tmp_path / "{step}", "score", save_best_only=True, mode="min")
    with pytest.warns(UserWarning, match=text):
        fit(make_model(), [Report(score=[value]), ours], epochs=1)
    assert list_steps(tmp_path) == [7]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
@pytest.mark.parametrize("first", [float("nan"), float("inf"), float("-inf")])
def test_a_metric_that_is_not_finite_is_never_best_and_said_once(first: float, tmp_path: Path) -> None:
    ours = ModelCheckpoint(tmp_path / "{step}", "score", save_best_only=True, mode="min")
    with pytest.warns(UserWarning, match="is never the best") as told:
        fit(make_model(), [Report(score=[first, first, 5.0, 6.0]), ours], epochs=4)
    assert len([warning for warning in told if "never the best" in str(warning.message)]) == 1
    assert list_steps(tmp_path) == [21]
    assert ours.best == 5.0


@pytest.mark.parametrize("dispatch", DISPATCHES, ids=lambda dispatch: dispatch.__name__)
def test_the_best_batch_is_saved_from_the_first_one_on(dispatch: Any, tmp_path: Path) -> None:
    losses = []
    recorder = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(logs["loss"]))
    fit(make_model(), [recorder], epochs=1)
    ours = ModelCheckpoint(tmp_path / "{step}", "loss", save_best_only=True, save_freq=1)
    fit(make_model(), dispatch(ours, []), epochs=1)
    best = [number + 1 for number, loss in enumerate(losses) if loss < min(losses[:number], default=np.inf)]
    assert list_steps(tmp_path) == best
    assert ours.best == min(losses)


# ------------------------------------------------------------------------------------------------ names


def test_one_best_directory_holds_exactly_the_newest(tmp_path: Path) -> None:
    ours = ModelCheckpoint(tmp_path / "best", "score", save_best_only=True, mode="min")
    model = make_model()
    for epoch, score in enumerate([3.0, 2.0, 4.0, 1.0], 1):
        fit(model, [Report(score=[score]), ours], epochs=1)
        assert list_steps(tmp_path / "best") == [{1: 7, 2: 14, 3: 14, 4: 28}[epoch]]
    loaded = keras.saving.load_model(tmp_path / "best")
    assert int(loaded.optimizer.iterations) == 28
    assert np.array_equal(loaded.get_layer("first").kernel, model.get_layer("first").kernel)


def test_a_directory_is_named_by_its_fields_and_is_itself_loadable(tmp_path: Path) -> None:
    ours = ModelCheckpoint(tmp_path / "{epoch:02d}-{val_loss:.2f}")
    history = fit(make_model(), [ours], validation_data=make_data())
    names = [f"{epoch:02d}-{loss:.2f}" for epoch, loss in enumerate(history.history["val_loss"], 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert [stats.path for stats in ours.stats] == [str(tmp_path / name) for name in names]
    for name, step in zip(names, (7, 14), strict=True):
        assert int(keras.saving.load_model(tmp_path / name).optimizer.iterations) == step


def test_fields_of_batches_are_filled_in(tmp_path: Path) -> None:
    losses = []
    recorder = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(logs["loss"]))
    fit(make_model(), [recorder], epochs=1)
    fit(make_model(), [ModelCheckpoint(tmp_path / "{epoch}-{batch}-{loss:.3f}", save_freq=3)], epochs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"1-3-{losses[2]:.3f}", f"1-6-{losses[5]:.3f}"]


@pytest.mark.parametrize("field", ["val_loss", "batch"])
def test_a_field_that_the_logs_lack_is_keras_error(field: str, tmp_path: Path) -> None:
    stock = keras.callbacks.ModelCheckpoint(f"{tmp_path}/{{{field}}}.keras")
    with pytest.raises(KeyError) as expected:
        fit(make_model(), [stock], epochs=1)
    ours = ModelCheckpoint(f"{tmp_path}/{{{field}}}")
    with pytest.raises(KeyError) as raised:
        fit(make_model(), [ours], epochs=1)
    ours.on_train_end()
    assert str(raised.value) == str(expected.value).replace(".keras", "")


@pytest.mark.parametrize("filepath", ["ünïcode/ckpts/{step}/", "a b/{step}", "{step}"])
def test_relative_names_stay_where_training_began(
    filepath: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wander(keras.callbacks.Callback):
        async_safe = True

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if batch == 3:
                monkeypatch.chdir("/")

    monkeypatch.chdir(tmp_path)
    fit(make_model(), [Wander(), ModelCheckpoint(Path(filepath), save_freq=3)], epochs=1)
    root = tmp_path / filepath.rstrip("/").removesuffix("{step}")
    assert list_steps(root) == [3, 6]


class Foreign:
    """A tensor of another library, which is not on the host."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("copy it to the host first")


def test_logs_of_any_kind_do_no_harm(tmp_path: Path) -> None:
    odd: Options = {"note": ["text"], "none": [None], "step": [99], "object": [object()], "flag": [True]}
    odd |= {"ragged": [[[1.0], [2.0, 3.0]]], "foreign": [Foreign()]}
    ours = ModelCheckpoint(tmp_path / "{step}")
    fit(make_model(), [Report(**odd), ours], epochs=1)
    assert list_steps(tmp_path) == [7]
    assert ours.stats[0].path == str(tmp_path / "7")
    metrics = json.loads((tmp_path / "7" / "offstep.json").read_text())["metrics"]
    assert metrics.keys() == {"loss", "mae", "step", "flag"}


def make_scaling() -> Any:  # an optimizer of Keras; the first steps overflow
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), initial_scale=2.0**126)


def make_accumulating() -> Any:  # an optimizer of Keras
    return keras.optimizers.SGD(0.01, gradient_accumulation_steps=3)


def make_scaling_accumulating() -> Any:  # an optimizer of Keras
    inner = keras.optimizers.SGD(0.01, gradient_accumulation_steps=2)
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)


def combine_optimizers() -> Iterator[Any]:  # of pytest
    """Each optimizer, both ways to execute and to save are there; their other combinations are in the campaigns."""
    makers = (make_scaling, make_accumulating, make_scaling_accumulating)
    chosen = {(make_scaling, 1, False), (make_accumulating, 3, True), (make_scaling_accumulating, 1, False)}
    for case in product(makers, (1, 3), (False, True)):
        yield pytest.param(*case, marks=() if case in chosen else pytest.mark.campaign)


@pytest.mark.parametrize(("make_optimizer", "executions", "is_weights_only"), list(combine_optimizers()))
def test_steps_are_the_iterations_of_the_optimizer(
    make_optimizer: Callable[[], Any],
    executions: int,
    is_weights_only: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = []

    class Iterations(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append(int(self.model.optimizer.iterations))

    options = {"save_freq": 1, "verbose": 1, "save_weights_only": is_weights_only}
    model = make_model(make_optimizer, steps_per_execution=executions)
    fit(model, [Iterations()])
    fit(make_model(make_optimizer, steps_per_execution=executions), [ModelCheckpoint(tmp_path / "{step}", **options)])
    assert list_steps(tmp_path) == sorted(set(seen))
    decided, finished = split_lines(capsys.readouterr().out)
    assert [line.rsplit("/", 1)[1] for line in decided] == [str(step) for step in seen]
    assert [line.rsplit("/", 1)[1] for line in finished] == [str(step) for step in seen]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    fit(make_model(), [ModelCheckpoint(tmp_path / "{step}", save_freq=2, max_to_keep=2)])
    assert list_steps(tmp_path) == [12, 14]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("filepath", "options", "text"),
    [
        (
            "x/{step}",
            {"save_freq": "batch"},
            "Unrecognized save_freq: batch. Expected save_freq are 'epoch'",
        ),
        ("x/{step}", {"save_freq": 0}, "at least 1 batch. Received: save_freq=0"),
        ("x/{step}", {"save_freq": -3}, "at least 1 batch. Received: save_freq=-3"),
        ("x/{step}", {"save_freq": 1.5}, "Unrecognized save_freq: 1.5"),
        ("x/{step}", {"max_to_keep": 0}, "max_to_keep must be None or an integer of at least 1. Received: 0"),
        ("x/{step}", {"slots": 0}, "slots must be an integer of at least 1. Received: 0"),
        ("x/{step}", {"on_busy": "drop"}, "on_busy must be 'wait', 'skip' or 'latest'. Received: 'drop'"),
        ("x/{step}", {"on_error": "ignore"}, "on_error must be 'raise' or 'warn'. Received: 'ignore'"),
        ("x/{step}", {"memory_budget": 0}, "memory_budget must be a positive number of bytes. Received: 0"),
        (
            "x/{step}",
            {"snapshot_mode": "fast"},
            "None, 'host', 'device_copy' or 'transfer'. Received: 'fast'",
        ),
        ("x/{epoch.real}", {}, "field '{epoch.real}' reaches into its value. Received: filepath=x/{epoch.real}"),
        ("x/{}", {}, "Received: filepath=x/{}"),
        ("x/{", {}, "Received: filepath=x/{"),
        ("", {}, "Received: filepath="),
    ],
)
def test_bad_arguments_are_refused_with_what_was_received(filepath: str, options: Options, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        ModelCheckpoint(filepath, **options)


def test_an_unknown_mode_warns_as_stock_does() -> None:
    with pytest.warns(UserWarning, match="ModelCheckpoint mode 'best' is unknown, fallback to auto mode."):
        ModelCheckpoint("x/{step}", mode="best")


@pytest.mark.parametrize("filepath", ["file/{step}", "file/deep/{step}", "file"])
def test_a_file_in_place_of_the_directory_is_refused_before_training(filepath: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    model = make_model()
    with pytest.raises(OSError, match=r"checkpoints cannot be saved here.*file"):
        fit(model, [ModelCheckpoint(tmp_path / filepath)])
    assert int(model.optimizer.iterations) == 0


def test_a_directory_that_cannot_be_written_to_is_refused_before_training() -> None:
    with pytest.raises(OSError, match=r"checkpoints cannot be saved here: .*'/proc/offstep'"):
        fit(make_model(), [ModelCheckpoint("/proc/offstep/{step}")])


def test_a_budget_that_holds_no_snapshot_is_refused_before_training(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(BudgetExceeded, match="Raise `memory_budget`"):
        fit(model, [ModelCheckpoint(tmp_path / "{step}", memory_budget=100)])
    assert int(model.optimizer.iterations) == 0


# ------------------------------------------------------------------------------------------------ failures


class At(keras.callbacks.Callback):
    """Does something before one batch, once what was saved until then is durable."""

    async_safe = True

    def __init__(self, batch: int, ours: Any, action: Callable[[], Any]) -> None:
        super().__init__()
        self.batch, self.ours, self.action = batch, ours, action

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch == self.batch:
            self.ours.wait_until_finished()
            self.action()


def test_a_directory_that_vanishes_is_raised_on_the_training_thread(tmp_path: Path) -> None:
    ours = ModelCheckpoint(tmp_path / "root" / "{step}", save_freq=2)
    model = make_model()
    with pytest.raises(SaveFailed, match=r"the directory to save into has vanished.*root"):
        fit(model, [ours, At(3, ours, lambda: (tmp_path / "root").rename(tmp_path / "moved"))], epochs=1)
    assert list_steps(tmp_path / "moved") == [2]
    take_failures(ours)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
def test_a_failure_is_only_warned_of_when_asked_for(tmp_path: Path) -> None:
    ours = ModelCheckpoint(tmp_path / "root" / "{step}", save_freq=3, on_error="warn")
    vanish = At(4, ours, lambda: (tmp_path / "root").rename(tmp_path / "moved"))
    with pytest.warns(RuntimeWarning, match="step 6 was not saved.*vanished"):
        fit(make_model(), [ours, vanish], epochs=1)
    assert (ours.counts.durable, ours.counts.failed) == (1, 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", disk]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("A full disk is not tested here: only root may mount one.")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def take_failures(ours: ModelCheckpoint) -> None:
    """Each is raised once; what nobody was told of would be printed at exit."""
    for _ in range(ours.counts.requested):
        with suppress(SaveFailed):
            ours.on_train_end()


def test_a_full_disk_is_raised_and_older_checkpoints_stay(small_disk: Path) -> None:
    ours = ModelCheckpoint(small_disk / "{step}", save_freq=1, retry_seconds=0)
    model = make_model()
    with pytest.raises(SaveFailed, match=r"No space left on device.*saved before it are untouched") as raised:
        fit(model, [ours], epochs=40)
    assert raised.value.errno == errno.ENOSPC
    take_failures(ours)
    kept = list_steps(small_disk)
    assert kept == list(range(1, len(kept) + 1))
    assert iterations(read_step(small_disk / str(kept[-1]))) == kept[-1]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
def test_skipped_saves_are_counted_and_said(tmp_path: Path) -> None:
    ours = ModelCheckpoint(tmp_path / "{step}", save_freq=1, slots=1, on_busy="skip")
    with pytest.warns(UserWarning, match="A save was skipped") as told:
        fit(make_model(), [ours], epochs=6)
    assert len([warning for warning in told if "skipped" in str(warning.message)]) == 1
    assert ours.counts.skipped > 0
    assert ours.counts.durable + ours.counts.skipped == ours.counts.requested == 6 * BATCHES
    assert len(list_steps(tmp_path)) == ours.counts.durable


# ------------------------------------------------------------------------------------------------ no torn state


class Fingerprint(keras.layers.Layer):
    """Writes the number of the batch into variables before and after the others."""

    def build(self, _: Any) -> None:
        self.marks = [
            self.add_weight(shape=(size,), initializer="zeros", trainable=False, name=f"mark_{size}")
            for size in (1, 1000, 100_000)
        ]

    def call(self, x: Any, training: bool = False) -> Any:  # backend tensors
        if training:
            for mark in self.marks:
                mark.assign(mark + 1.0)
        return x


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.campaign)])
def test_each_of_many_checkpoints_in_a_row_holds_one_state(count: int, tmp_path: Path) -> None:
    keras.utils.clear_session()
    inputs = keras.layers.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(1, name="last")(Fingerprint(name="prints")(inputs)))
    model.compile("adam", "mse")
    biases = []
    recorder = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: (
            biases.append(np.array(model._jax_state["trainable_variables"][1])) if batch else None
        )
    )
    recorder.async_safe = True
    ours = ModelCheckpoint(tmp_path / "{step}", save_freq=1)
    with pytest.warns(UserWarning, match="custom_objects"):
        fit(
            model,
            [recorder, ours],
            x=np.ones((2 * count, 3), "float32"),
            y=np.ones((2 * count, 1), "float32"),
            batch_size=2,
            epochs=1,
        )
    assert list_steps(tmp_path) == list(range(1, count + 1))
    for step in range(1, count + 1):
        state = read_step(tmp_path / str(step))
        prints = [array for path, array in state.items() if "/prints/" in path]
        assert len(prints) == 3
        assert iterations(state) == step
        assert all(np.all(array == step) for array in prints)
        if step < count:
            assert np.array_equal(state["trainable_variables/last/bias"], biases[step - 1])


# -------------------------------------------------------------------------------------------------- what is kept


class Losses(keras.callbacks.Callback):
    """Says what the loss was, in the place of what it was."""

    def __init__(self, *losses: float) -> None:
        super().__init__()
        self._losses = losses

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        assert logs is not None
        logs["val_loss"] = self._losses[epoch]


def test_the_best_epochs_stay_beside_the_newest(tmp_path: Path) -> None:
    ours = ModelCheckpoint(tmp_path / "{step}", max_to_keep=1, keep_best=2)
    fit(make_model(), [Losses(3.0, 1.0, 2.0, 4.0, 5.0), ours], epochs=5)
    assert list_steps(tmp_path) == [14, 21, 35]


class BecomesNan(keras.callbacks.Callback):
    """Makes the weights NaN after some epochs."""

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if epoch == 1:
            self.model.layers[-1].bias.assign([float("nan")])


@pytest.mark.parametrize("name", ["{epoch}.keras", "{epoch}.weights.h5"])
def test_files_with_nan_weights_never_retire_those_without(name: str, tmp_path: Path) -> None:
    """They once did, where each save is a file."""
    ours = ModelCheckpoint(tmp_path / "ckpts" / name, max_to_keep=1, save_weights_only=name.endswith(".h5"))
    fit(make_model(), [BecomesNan(), ours], epochs=4)
    assert sorted(path.name for path in (tmp_path / "ckpts").iterdir()) == [name.format(epoch=n) for n in (1, 4)]


def test_the_best_of_an_earlier_run_is_to_be_beaten_only_if_asked(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_best_only": True, "max_to_keep": 5}
    fit(make_model(), [Losses(3.0, 1.0), ModelCheckpoint(tmp_path / "{step}", **options)])
    assert list_steps(tmp_path) == [7, 14]
    resumed = ModelCheckpoint(tmp_path / "{step}", resume_best=True, **options)
    model = make_model()
    fit(model, [])
    fit(model, [Losses(2.0, 0.5), resumed])
    assert list_steps(tmp_path) == [7, 14, 28]
    assert resumed.best == 0.5
    anew = ModelCheckpoint(tmp_path / "{step}", **options)
    fit(model, [Losses(2.0, 3.0), anew])
    assert list_steps(tmp_path) == [7, 14, 28, 35]


def test_the_best_can_be_resumed_from_one_directory_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resume_best needs a directory whose name has no fields\. Received: "):
        ModelCheckpoint(tmp_path / "{epoch}", resume_best=True)
