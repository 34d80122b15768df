"""The callback against stock `ModelCheckpoint` in real runs of Keras: same moments, same states, same words."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import keras
import pytest
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

from offstep import ModelCheckpoint

Model = Any  # Keras carries no types
Options = dict[str, Any]  # arguments of Keras


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
        cases.append(pytest.param(run, save_freq, dispatch, id=f"{run}-{save_freq}-{dispatch.__name__}"))
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
