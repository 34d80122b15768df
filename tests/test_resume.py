"""Interrupted trainings end as uninterrupted ones do, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from interrupted import (
    BATCHES,
    Diary,
    Interrupt,
    Interrupted,
    InterruptTest,
    Outcome,
    Plain,
    QuietDiary,
    Shuffled,
    assert_equal,
    fit,
    generate,
    let_go,
    make_data,
    make_model,
    train,
)
from runs import assert_same, read_state

from offstep import BackupAndRestore, ModelCheckpoint

Callback = Any  # Keras carries no types
MakeCallbacks = Callable[[], list[Callback]]

pytestmark = [
    pytest.mark.usefixtures("one_writer"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras, within `pytest.warns`
]


def backed_up(directory: Path, *, others: MakeCallbacks = list, **options: Any) -> MakeCallbacks:
    """Callbacks with a backup after every batch among them."""
    return lambda: [BackupAndRestore(directory, **({"save_freq": 1} | options)), *others()]


def deciding() -> list[Callback]:
    return [
        keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=10.0),
    ]


def scheduled() -> list[Callback]:
    return [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.7)]


def in_a_diary() -> list[Callback]:
    return [QuietDiary()]


def in_two_diaries() -> list[Callback]:
    return [Diary(), Diary()]


def train_whole(make_callbacks: MakeCallbacks = list) -> Outcome:
    """Trains without any interruption, once for each kind of callbacks."""
    return copy.deepcopy(_train_whole(make_callbacks))


_train_whole = cache(train)


def choose(*batches: int, others: tuple[int, ...]) -> list[Any]:  # of pytest
    return [*batches, *(pytest.param(batch, marks=pytest.mark.campaign) for batch in others)]


@pytest.mark.parametrize("batch", choose(2, BATCHES, BATCHES + 1, others=(1, 5, 2 * BATCHES, 3 * BATCHES - 1)))
def test_a_training_goes_on_at_the_batch_where_it_was_interrupted(tmp_path: Path, batch: int) -> None:
    expected = train_whole(in_a_diary)
    resumed = train(backed_up(tmp_path, others=in_a_diary), [Interrupt(batch + 1)])
    expected.decisions.insert(0, resumed.decisions[0])
    assert_equal(resumed, expected)


@pytest.mark.parametrize("batch", choose(5, BATCHES, others=(1, BATCHES + 1)))
def test_so_it_does_where_callbacks_hear_of_batches_on_the_training_thread(tmp_path: Path, batch: int) -> None:
    """Those before ours in the list heard of the last batch before the save, those behind it after."""
    expected = train_whole(in_two_diaries)
    make = lambda: [Diary(), BackupAndRestore(tmp_path, save_freq=1), Diary()]  # noqa: E731
    resumed = train(make, [Interrupt(batch + 1)])
    del resumed.decisions[1]
    assert_equal(resumed, expected)


@pytest.mark.parametrize("is_first", [True, False])
def test_what_others_do_to_the_model_before_a_batch_is_not_undone(tmp_path: Path, is_first: bool) -> None:
    class WarmUp(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.model.optimizer.learning_rate = 0.01 / (batch + 1)

    expected = train(lambda: [WarmUp()])
    backup = partial(BackupAndRestore, tmp_path, save_freq=1)
    resumed = train(lambda: [backup(), WarmUp()] if is_first else [WarmUp(), backup()], [Interrupt(4), Interrupt(9)])
    resumed.decisions.pop()
    assert_equal(resumed, expected)


@pytest.mark.parametrize("count", choose(4, others=(11,)))
def test_every_interruption_of_many_is_survived(tmp_path: Path, count: int) -> None:
    expected = train_whole(deciding)
    interruptions = [Interrupt(3) for _ in range(count)]
    resumed = train(lambda: [*deciding(), BackupAndRestore(tmp_path, save_freq=1)], interruptions)
    assert resumed.attempts == count + 1
    resumed.decisions.pop()
    assert_equal(resumed, expected)


@pytest.mark.parametrize("others", [deciding, scheduled])
@pytest.mark.parametrize("is_first", [True, False])
def test_decisions_of_other_callbacks_are_the_same_wherever_they_are_listed(
    tmp_path: Path, others: MakeCallbacks, is_first: bool
) -> None:
    expected = train_whole(others)

    def make() -> list[Callback]:
        backup = BackupAndRestore(tmp_path, save_freq="epoch")
        return [backup, *others()] if is_first else [*others(), backup]

    resumed = train(make, [Interrupt(BATCHES + 3), Interrupt(BATCHES + 1)])
    assert resumed.attempts == 3
    resumed.decisions.pop(0 if is_first else -1)
    assert_equal(resumed, expected)


@pytest.mark.parametrize("count", [1, 2])
def test_an_interruption_in_the_validation_repeats_only_the_validation(tmp_path: Path, count: int) -> None:
    expected = train_whole(in_a_diary)
    resumed = train(backed_up(tmp_path, others=in_a_diary), [InterruptTest(count)])
    del resumed.decisions[0]
    assert_equal(resumed, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": False},
        {"shuffle": "batch"},
        {"steps_per_epoch": 4},
        {"class_weight": {0: 1.0, 1: 2.0}, "y": np.zeros((22, 1), "int32")},
        {"validation_split": 0.25, "validation_data": None},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_the_order_of_arrays_is_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    run = partial(fit, **options)
    expected = train(list, run=run)
    resumed = train(backed_up(tmp_path), [Interrupt(4), Interrupt(5)], run=run)
    assert resumed.attempts == 3
    del resumed.decisions[0]
    assert_equal(resumed, expected)


@pytest.mark.parametrize("save_freq", [1, "epoch"])
def test_the_order_of_a_dataset_is_the_same(tmp_path: Path, save_freq: Any) -> None:
    def run(model: Any, callbacks: list[Callback]) -> Any:
        return model.fit(Shuffled(), epochs=3, verbose=0, shuffle=True, callbacks=callbacks)

    expected = train(list, run=run)
    interruptions = [Interrupt(4), Interrupt(BATCHES + 2)]
    resumed = train(backed_up(tmp_path, save_freq=save_freq), interruptions, run=run)
    assert resumed.attempts == 3
    del resumed.decisions[0]
    assert_equal(resumed, expected)


def test_with_workers_the_position_in_a_dataset_is_told_to_be_in_doubt(tmp_path: Path) -> None:
    """Keras keeps what they have read ahead for the next epoch, so the order depends on their speed."""

    def run(model: Any, callbacks: list[Callback]) -> Any:
        return model.fit(Plain(workers=2), epochs=2, verbose=0, callbacks=callbacks)

    with pytest.warns(UserWarning, match="Keras's workers read ahead of the training"):
        resumed = train(backed_up(tmp_path), [Interrupt(4)], run=run)
    assert resumed.epochs == [0, 1]


def test_batches_of_a_dataset_that_are_skipped_are_not_read(tmp_path: Path) -> None:
    read: list[int] = []

    class Counted(Plain):
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return super().__getitem__(index)

    def run(model: Any, callbacks: list[Callback]) -> Any:
        return model.fit(Counted(), epochs=1, verbose=0, shuffle=False, callbacks=callbacks)

    train(backed_up(tmp_path), [Interrupt(5)], run=run)
    assert read == [0, 0, 1, 2, 3, 0, 4, 5]  # Keras reads the first one to build losses and metrics


def test_a_generator_is_skipped_forward_and_that_is_said(tmp_path: Path) -> None:
    def run(model: Any, callbacks: list[Callback]) -> Any:
        return model.fit(generate(), steps_per_epoch=5, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)

    expected = train(list, run=run)
    with pytest.warns(UserWarning, match="a generator is brought to its position by drawing and dropping"):
        resumed = train(backed_up(tmp_path), [Interrupt(3), Interrupt(7)], run=run)
    del resumed.decisions[0]
    assert_equal(resumed, expected)


@pytest.mark.parametrize(
    "options",
    [{"steps_per_execution": 3}, {"jit_compile": False}],
    ids=lambda each: next(iter(each)),
)
def test_compiled_in_another_way_it_is_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    make = partial(make_model, **options)
    expected = train(list, make=make)
    resumed = train(backed_up(tmp_path), [Interrupt(2), Interrupt(3)], make=make)
    assert resumed.attempts == 3
    del resumed.decisions[0]
    assert_equal(resumed, expected)


def test_with_gradient_accumulation_it_is_the_same(tmp_path: Path) -> None:
    make = lambda: make_model(optimizer=keras.optimizers.Adam(0.05, gradient_accumulation_steps=4))  # noqa: E731
    expected = train(list, make=make)
    resumed = train(backed_up(tmp_path), [Interrupt(3), Interrupt(7)], make=make)
    del resumed.decisions[0]
    assert_equal(resumed, expected)


def test_a_model_checkpoint_resumes_from_its_own_directory(tmp_path: Path) -> None:
    expected = train_whole(deciding)
    make = lambda: [ModelCheckpoint(tmp_path / "{step}", save_freq=2, resume=True), *deciding()]  # noqa: E731
    resumed = train(make, [Interrupt(6), Interrupt(7)])
    assert resumed.attempts == 3
    assert "best" in resumed.decisions.pop(0)
    assert_equal(resumed, expected)


def test_a_finished_training_is_not_trained_on_and_keeps_its_history(tmp_path: Path) -> None:
    make = backed_up(tmp_path, save_freq="epoch", delete_checkpoint=False)
    first = train(make)
    again = train(make, run=partial(fit, x=np.full((22, 3), np.nan, "float32")))
    assert_equal(again, first)


def test_more_epochs_go_on_where_fewer_ended(tmp_path: Path) -> None:
    expected = train(list, run=partial(fit, epochs=5))
    make = backed_up(tmp_path, save_freq="epoch", delete_checkpoint=False)
    train(make, run=partial(fit, epochs=2))
    resumed = train(make, run=partial(fit, epochs=5))
    del resumed.decisions[0]
    assert_equal(resumed, expected)


def test_what_cannot_be_continued_exactly_begins_its_epoch_again_and_is_said(tmp_path: Path) -> None:
    x, y = make_data(rows=30)
    make = backed_up(tmp_path)
    with pytest.warns(UserWarning, match=r"Epoch 1 begins again, .*: batch_count was 6, now it is 8"):
        train(
            make,
            [Interrupt(3)],
            run=lambda model, callbacks: fit(
                model, callbacks, **({} if isinstance(callbacks[-1], Interrupt) else {"x": x, "y": y})
            ),
        )


@pytest.mark.parametrize("kind", ["map", "iterator"])
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_a_grain_dataset_goes_on_where_its_iterator_was(tmp_path: Path, kind: str) -> None:
    grain = pytest.importorskip("grain", reason="pip install offstep[grain]")
    rows = list(zip(*make_data(), strict=True))

    def run(model: Any, callbacks: list[Callback]) -> Any:
        data = grain.MapDataset.source(rows).seed(3).shuffle().batch(4)
        data = data if kind == "map" else data.to_iter_dataset()
        return model.fit(data, epochs=3, verbose=0, shuffle=False, callbacks=callbacks)

    expected = train(list, run=run)
    resumed = train(backed_up(tmp_path), [Interrupt(4), Interrupt(5)], run=run)
    assert resumed.attempts == 3
    del resumed.decisions[0]
    assert_equal(resumed, expected)


def test_a_resume_with_nothing_left_to_train_does_not_lead_the_next_fit(tmp_path: Path) -> None:
    """Keras has one initial epoch for a model; only an epoch that began took it back."""
    fit(make_model(), [BackupAndRestore(tmp_path, delete_checkpoint=False)], epochs=2)
    model = make_model()
    assert fit(model, [BackupAndRestore(tmp_path)], epochs=2).epoch == [0, 1]
    assert int(model.optimizer.iterations) == 2 * BATCHES
    assert fit(model, [], epochs=2).epoch == [0, 1]
    assert int(model.optimizer.iterations) == 4 * BATCHES


def test_two_callbacks_that_resume_one_fit_are_refused(tmp_path: Path) -> None:
    callbacks = [ModelCheckpoint(tmp_path / "a" / "{step}", resume=True), BackupAndRestore(tmp_path / "b")]
    with pytest.raises(ValueError, match="Received: a second one, BackupAndRestore"):
        fit(make_model(), callbacks)
    let_go(callbacks)
    fit(make_model(), callbacks[1:], epochs=1)  # alone it may


def test_a_callback_that_evaluates_before_the_state_is_put_back_does_no_harm(tmp_path: Path) -> None:
    """The arrays of the checkpoint were those of the model's variables, which a step of Keras donates."""

    class Warm(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            self.model.train_on_batch(*make_data(4))
            self.model.evaluate(*make_data(4), verbose=0)

    expected = train_whole()
    interrupted = BackupAndRestore(tmp_path, save_freq=1)
    with pytest.raises(Interrupted):
        fit(make_model(), [interrupted, Interrupt(BATCHES + 3)])
    let_go([interrupted])
    model = make_model()
    history = fit(model, [BackupAndRestore(tmp_path, save_freq=1), Warm()])
    assert history.epoch == expected.epochs
    assert_same(read_state(model), expected.state)
