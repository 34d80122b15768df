"""Whole runs with Keras's other callbacks: the same files and the same history as with stock's callback."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import keras
import pytest
from keras_file_reader import assert_same_files
from runs import fit, make_data, make_model

from offstep import ModelCheckpoint

pytestmark = pytest.mark.usefixtures("one_writer")

Callbacks = list[Any]  # Keras carries no types
MakeCheckpoint = Callable[..., Any]


def make_averaging() -> Any:  # an optimizer of Keras
    return keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.5)


def one_of_each(make: MakeCheckpoint, root: Path) -> Callbacks:
    """Every epoch, every third batch, the best, and in each format."""
    return [
        make(root / "{epoch:02d}-{val_loss:.4f}.weights.h5", save_weights_only=True),
        make(root / "batch-{epoch}-{batch}.keras", save_freq=3),
        make(root / "best.keras", "val_mae", save_best_only=True, mode="min"),
        make(root / "best.weights.h5", "loss", save_best_only=True, save_weights_only=True),
    ]


def stop_early(root: Path) -> Callbacks:
    return [keras.callbacks.EarlyStopping("val_loss", min_delta=9.0, patience=1, restore_best_weights=True)]


def reduce_the_rate(root: Path) -> Callbacks:
    return [keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=9.0, cooldown=0)]


def schedule_the_rate(root: Path) -> Callbacks:
    return [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)]


def write_a_table(root: Path) -> Callbacks:
    root.mkdir()
    return [keras.callbacks.CSVLogger(root / "log.csv")]


def swap_averages(root: Path) -> Callbacks:
    return [keras.callbacks.SwapEMAWeights()]


def swap_averages_at_the_end(root: Path) -> Callbacks:
    return [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]


def write_a_dashboard(root: Path) -> Callbacks:
    if any(importlib.util.find_spec(name) is None for name in ("tensorflow", "tensorboard")):
        pytest.skip("TensorBoard is NOT tested here: it or TensorFlow is not installed.")
    return [keras.callbacks.TensorBoard(root / "logs", update_freq=2)]


def all_together(root: Path) -> Callbacks:
    return [*write_a_table(root), *schedule_the_rate(root), *reduce_the_rate(root), *stop_early(root)]


BESIDE = (
    stop_early,
    reduce_the_rate,
    schedule_the_rate,
    write_a_table,
    swap_averages,
    swap_averages_at_the_end,
    write_a_dashboard,
    all_together,
)


def combine() -> Iterator[Any]:  # of pytest
    """Ours behind all of them, and before those that change the weights."""
    for others, is_last in product(BESIDE, (True, False)):
        is_chosen = is_last or others in {stop_early, swap_averages, all_together}
        name = f"{others.__name__}-{'ours last' if is_last else 'ours first'}"
        yield pytest.param(others, is_last, id=name, marks=() if is_chosen else pytest.mark.campaign)


@pytest.mark.parametrize(("others", "is_last"), list(combine()))
def test_a_run_beside_other_callbacks_leaves_what_stock_leaves(
    others: Callable[[Path], Callbacks], is_last: bool, tmp_path: Path
) -> None:
    histories = []
    for folder, make in (("stock", keras.callbacks.ModelCheckpoint), ("ours", ModelCheckpoint)):
        root = tmp_path / folder
        model = make_model(make_averaging if others in {swap_averages, swap_averages_at_the_end} else None)
        beside, checkpoints = others(root), one_of_each(make, root)
        callbacks = [*beside, *checkpoints] if is_last else [*checkpoints, *beside]
        histories.append(fit(model, callbacks, epochs=4, validation_data=make_data()))
    assert histories[0].history == histories[1].history
    assert histories[0].epoch == histories[1].epoch
    assert_same_files(tmp_path / "ours", tmp_path / "stock")
