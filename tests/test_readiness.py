"""When a callback touches its slots and starts its writer: before the first save, and never if none is to come."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import keras
import pytest
from processes import find_writers, wait_until
from runs import BATCHES, assert_same, fit, generate_batches, list_steps, make_model, read_state, read_step

from offstep import ModelCheckpoint

Options = dict[str, Any]  # arguments of Keras


class Watch(keras.callbacks.Callback):
    """Notes before which batches, counted from 0, there is a writer; gives the epochs a `score`."""

    def __init__(self, scores: list[float] | None = None) -> None:
        super().__init__()
        self.scores = scores or []
        self.cold: list[int] = []
        self.batches = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if find_writers():
            wait_until(lambda: all(touched_parts()))
        else:
            assert not any(touched_parts())
            self.cold.append(self.batches)
        self.batches += 1

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.scores:
            logs["score"] = self.scores[epoch]


def touched_parts() -> Iterator[bool]:
    """Yields for each slot of this process whether it has memory."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            if os.readlink(entry).startswith("/memfd:offstep-slot"):
                yield entry.stat().st_blocks > 0


def best_above(threshold: float | None) -> Options:
    return {"monitor": "score", "mode": "max", "save_best_only": True, "initial_value_threshold": threshold}


@pytest.mark.parametrize(
    "options",
    [{"save_freq": 2 * BATCHES + 1}, {"save_freq": "3 epochs"}, {"save_freq": "2h"}, best_above(5.0)],
    ids=["too few batches", "too few epochs", "too little time", "threshold"],
)
def test_a_callback_that_never_saves_touches_and_starts_nothing(options: Options, tmp_path: Path) -> None:
    watch = Watch([4.0, 3.0])
    ours = ModelCheckpoint(tmp_path / "{step}", **options)
    fit(make_model(), [watch, ours])
    assert watch.cold == list(range(2 * BATCHES))
    assert ours.counts.requested == 0
    assert list_steps(tmp_path) == []


@pytest.mark.parametrize(
    "options",
    [{}, {"save_freq": 2 * BATCHES}, {"save_freq": "30s"}, {"overhead_budget": "1%"}, best_above(None)],
    ids=["epochs", "batches", "time", "budget", "first best"],
)
def test_a_callback_that_will_save_is_ready_from_the_start(options: Options, tmp_path: Path) -> None:
    watch = Watch([4.0, 3.0])
    fit(make_model(), [watch, ModelCheckpoint(tmp_path / "{step}", **options)])
    assert watch.cold == []


@pytest.mark.filterwarnings("ignore:.*ran out of data.*:UserWarning")
def test_it_is_ready_after_half_of_the_batches_where_nobody_knows_how_many_there_are(tmp_path: Path) -> None:
    watch = Watch()
    ours = ModelCheckpoint(tmp_path / "{step}", save_freq=6)
    fit(make_model(), [ours, watch], x=generate_batches(), epochs=1)
    assert watch.cold == [0, 1, 2]
    assert list_steps(tmp_path) == [6]


def test_it_is_ready_once_the_metric_gets_near_the_threshold(tmp_path: Path) -> None:
    watch = Watch([1.0, 2.0, 4.0, 6.0])
    fit(make_model(), [watch, ModelCheckpoint(tmp_path / "{step}", **best_above(5.0))], epochs=4)
    assert watch.cold == list(range(3 * BATCHES))
    assert list_steps(tmp_path) == [4 * BATCHES]


@pytest.mark.parametrize("name", ["{step}", "{batch}.weights.h5"])
def test_a_save_that_nobody_expected_is_made_all_the_same(name: str, tmp_path: Path) -> None:
    class SaveNow(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            ours.save_freq = 2 * BATCHES

    ours = ModelCheckpoint(tmp_path / name, save_freq=10_000, save_weights_only=name != "{step}")
    fit(model := make_model(), [ours, SaveNow()])
    assert ours.counts.durable == 1
    if name == "{step}":
        assert_same(read_step(tmp_path / f"{2 * BATCHES}"), read_state(model))
    else:
        model.load_weights(tmp_path / f"{BATCHES}.weights.h5")
