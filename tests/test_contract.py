"""What scripts and subclasses may do as with stock's callback: hooks, aliases, overridden methods, attributes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from runs import BATCHES, StockRecord, assert_same, fit, iterations, list_steps, make_data, make_model, read_step

from offstep import BackupAndRestore, Checkpointer, ModelCheckpoint

pytestmark = pytest.mark.usefixtures("one_writer")

Model = Any  # Keras carries no types


# ------------------------------------------------------------------------------------------------ construction


def test_it_is_a_checkpoint_of_keras() -> None:
    assert isinstance(ModelCheckpoint("x/{step}"), keras.callbacks.ModelCheckpoint)


def test_arguments_come_in_the_order_of_keras() -> None:
    ours = ModelCheckpoint("x/{step}", "acc", 1, True, True, "max", 7, 0.5)
    stock = keras.callbacks.ModelCheckpoint("x.weights.h5", "acc", 1, True, True, "max", 7, 0.5)
    for name, value in vars(stock).items():
        if name != "filepath":
            assert getattr(ours, name) == value, name


@pytest.mark.filterwarnings("ignore:ModelCheckpoint mode 'best' is unknown:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "best", "save_freq": "often", "filepath": "x.txt"},
        {"save_freq": 1.5, "filepath": "x.txt"},
        {"save_freq": "often"},
        {"save_freq": None},
    ],
)
def test_checks_come_in_the_order_of_keras_and_begin_with_its_words(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as expected:  # noqa: PT011  its text is compared
        keras.callbacks.ModelCheckpoint(**{"filepath": "x.keras"} | options)
    with pytest.raises(ValueError, match=f"^{re.escape(str(expected.value))}"):
        ModelCheckpoint(**{"filepath": "x/{step}"} | options)


def test_an_unknown_mode_is_warned_of_before_anything_is_refused() -> None:
    with (
        pytest.warns(UserWarning, match="^ModelCheckpoint mode 'best' is unknown, fallback to auto mode.$"),
        pytest.raises(ValueError, match="Unrecognized save_freq: never"),
    ):
        ModelCheckpoint("x/{step}", mode="best", save_freq="never")


def test_a_subclass_is_warned_of_under_its_own_name() -> None:
    class Mine(ModelCheckpoint):
        pass

    with pytest.warns(UserWarning, match="^Mine mode 'best' is unknown"):
        assert Mine("x/{step}", mode="best").mode == "auto"


def test_a_script_may_put_our_class_in_the_place_of_stock_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.callbacks, "ModelCheckpoint", ModelCheckpoint)
    assert keras.callbacks.ModelCheckpoint("x.keras").filepath == "x.keras"
    with pytest.raises(ValueError, match=r"must end in `\.weights\.h5`"):
        keras.callbacks.ModelCheckpoint("x.keras", save_weights_only=True)


# ------------------------------------------------------------------------------------------------ how often


@pytest.mark.parametrize(
    ("save_freq", "steps"),
    [
        pytest.param("epoch", [7, 14, 21, 28, 35], marks=pytest.mark.campaign),
        ("1 epoch", [7, 14, 21, 28, 35]),
        ("2 epochs", [14, 28]),
        ("6 epochs", []),
        ("10 batches", [10, 20, 30]),
        pytest.param(10, [10, 20, 30], marks=pytest.mark.campaign),
    ],
)
def test_saves_every_so_many_epochs_or_batches(save_freq: Any, steps: list[int], tmp_path: Path) -> None:
    fit(make_model(), [ModelCheckpoint(tmp_path / "{step}", save_freq=save_freq)], epochs=5)
    assert list_steps(tmp_path) == steps


def test_epochs_are_counted_on_in_a_second_fit(tmp_path: Path) -> None:
    ours, model = ModelCheckpoint(tmp_path / "{step}", save_freq="2 epochs"), make_model()
    for epochs in (1, 2, 1):
        fit(model, [ours], epochs=epochs)
    assert list_steps(tmp_path) == [14, 28]


class Hand:
    """A clock that others move on."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Wind(keras.callbacks.Callback):
    """Moves the clock on by a second with each batch."""

    async_safe = True

    def __init__(self, hand: Hand) -> None:
        super().__init__()
        self.hand = hand

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.hand.seconds += 1


@cache
def record_every_batch() -> StockRecord:
    recorded = StockRecord(save_freq=1)
    fit(make_model(), [recorded])
    return recorded


TIMES = {"3s": [3, 6, 9, 12], "0.1 min": [6, 12], "13.5 seconds": [14], "1h": [], "0.01s": list(range(1, 15))}


def list_times() -> Iterator[Any]:  # of pytest
    for (save_freq, steps), way in product(TIMES.items(), ("asynchronous", "synchronous")):
        others = [keras.callbacks.TerminateOnNaN()] if way == "synchronous" else []
        is_double = way == "synchronous" and save_freq != "3s"
        marks = [pytest.mark.campaign] if is_double else []
        yield pytest.param(save_freq, steps, others, id=f"{save_freq}-{way}", marks=marks)


@pytest.mark.parametrize(("save_freq", "steps", "others"), list(list_times()))
def test_saves_after_the_first_batch_that_ends_a_time(
    save_freq: str, steps: list[int], others: list[Any], tmp_path: Path
) -> None:
    hand = Hand()
    ours = ModelCheckpoint(tmp_path / "{step}", save_freq=save_freq, clock=hand, slots=8)
    fit(make_model(), [*others, ours, Wind(hand)])
    assert list_steps(tmp_path) == steps
    for state in record_every_batch().states:
        if iterations(state) in steps:
            assert_same(read_step(tmp_path / str(iterations(state))), state)


def test_time_goes_on_between_two_fits(tmp_path: Path) -> None:
    hand = Hand()
    ours, model = ModelCheckpoint(tmp_path / "{step}", save_freq="10 s", clock=hand), make_model()
    for _ in range(2):
        fit(model, [ours, Wind(hand)], epochs=1)
    assert list_steps(tmp_path) == [10]


def test_a_time_decides_with_the_metric_of_its_batch(tmp_path: Path) -> None:
    losses: list[float] = []
    recorder = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(logs["loss"]))
    fit(make_model(), [recorder], epochs=1)
    hand = Hand()
    template = tmp_path / "{batch}-{loss:.3f}"
    ours = ModelCheckpoint(template, "loss", save_freq="2s", clock=hand, save_best_only=True)
    fit(make_model(), [ours, Wind(hand)], epochs=1)
    seen = [(batch, losses[batch - 1]) for batch in (2, 4, 6)]
    best = [(batch, loss) for i, (batch, loss) in enumerate(seen) if all(loss < other for _, other in seen[:i])]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{batch}-{loss:.3f}" for batch, loss in best]


def test_attributes_that_are_set_later_hold_from_then_on(tmp_path: Path) -> None:
    ours, model = ModelCheckpoint(tmp_path / "a" / "{step}", save_freq=3), make_model()
    fit(model, [ours], epochs=1)
    ours.filepath, ours.save_freq = str(tmp_path / "b" / "{step}"), "epoch"
    assert (ours.filepath, ours.save_freq) == (str(tmp_path / "b" / "{step}"), "epoch")
    fit(model, [ours], epochs=1)
    assert (list_steps(tmp_path / "a"), list_steps(tmp_path / "b")) == ([3, 6], [14])
    with pytest.raises(ValueError, match="Unrecognized save_freq: often"):
        ours.save_freq = "often"
    with pytest.raises(ValueError, match="reaches into its value"):
        ours.filepath = "{epoch.real}"


def test_a_filepath_that_is_set_in_mid_training_holds_from_then_on(tmp_path: Path) -> None:
    class Redirect(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            ours.filepath = tmp_path / f"of-{epoch}" / "{step}"

    ours = ModelCheckpoint(tmp_path / "never" / "{step}")
    fit(make_model(), [ours, Redirect()])
    assert (list_steps(tmp_path / "of-0"), list_steps(tmp_path / "of-1")) == ([7], [14])
    assert list_steps(tmp_path / "never") == []


# ------------------------------------------------------------------------------------------------ subclasses


def test_overridden_decision_about_batches_is_asked(tmp_path: Path) -> None:
    class Odd(ModelCheckpoint):
        def _should_save_on_batch(self, batch: int) -> bool:
            return batch in {1, 2, 5}

    fit(make_model(), [Odd(tmp_path / "{step}", save_freq=1)], epochs=1)
    assert list_steps(tmp_path) == [2, 3, 6]


@pytest.mark.parametrize("save_freq", ["epoch", 2])
def test_overridden_decision_is_given_what_stock_gives(save_freq: Any, tmp_path: Path) -> None:
    def make(base: Any, asked: list[Any], filepath: Path) -> Any:
        class Picky(base):  # type: ignore[misc]
            def _should_save_model(self, epoch: int, batch: int | None, logs: Any, filepath: str) -> bool:
                asked.append((epoch, batch, dict(logs), Path(filepath).stem))
                return bool(super()._should_save_model(epoch, batch, logs, filepath)) and epoch == 1

        return Picky(filepath, save_freq=save_freq)

    theirs: list[Any] = []
    ours: list[Any] = []
    fit(make_model(), [make(keras.callbacks.ModelCheckpoint, theirs, tmp_path / "stock" / "{epoch}.keras")])
    fit(make_model(), [make(ModelCheckpoint, ours, tmp_path / "ours" / "{epoch}")])
    assert ours == theirs
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["2"]


def test_overridden_save_decides_whether_and_finds_the_model(tmp_path: Path) -> None:
    seen = []

    class Announcing(ModelCheckpoint):
        def _save_model(self, epoch: int, batch: int | None, logs: Any) -> None:
            seen.append((batch, int(self.model.optimizer.iterations), sorted(logs)))
            if batch != 3:
                super()._save_model(epoch=epoch, batch=batch, logs=logs)

    fit(make_model(), [Announcing(tmp_path / "{step}", save_freq=2)], epochs=1)
    assert seen == [(1, 2, ["loss", "mae"]), (3, 4, ["loss", "mae"]), (5, 6, ["loss", "mae"])]
    assert list_steps(tmp_path) == [2, 6]


@pytest.mark.parametrize(
    ("template", "name", "places"),
    [
        ("a/{step}", lambda path, epoch: path.replace("/a/", "/b/"), ["b/7", "b/14"]),
        ("a/{step}", lambda path, epoch: f"{path}-kept", ["a/14-kept/14", "a/7-kept/7"]),
        ("a/best", lambda path, epoch: f"{path}-{epoch}", ["a/best-0/7", "a/best-1/14"]),
        ("a/{epoch}-{rate:.2f}", lambda path, epoch: path, ["a/1-0.50/7", "a/2-0.50/14"]),
    ],
)
def test_overridden_name_is_where_it_goes(
    template: str, name: Callable[[str, int], str], places: list[str], tmp_path: Path
) -> None:
    class Renaming(ModelCheckpoint):
        def _get_file_path(self, epoch: int, batch: int | None, logs: Any) -> str:
            return name(super()._get_file_path(epoch, batch, {**logs, "rate": 0.5}), epoch)

    ours = Renaming(tmp_path / template)
    fit(make_model(), [ours])
    found = [path.parent.relative_to(tmp_path) for path in tmp_path.rglob("offstep.json")]
    assert sorted(map(str, found)) == sorted(places)
    assert [Path(stats.path).is_dir() for stats in ours.stats] == [True, True]


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_test_batch_end", "on_batch_end"])
def test_hooks_of_a_subclass_run_on_the_training_thread(hook: str, tmp_path: Path) -> None:
    import threading

    threads = set()

    def note(self: Any, batch: int, logs: Any = None) -> None:
        threads.add(threading.get_ident())
        getattr(ModelCheckpoint, hook)(self, batch, logs)

    ours = type("Mine", (ModelCheckpoint,), {hook: note})(tmp_path / "{step}", save_freq=3)
    fit(make_model(), [ours], validation_data=make_data())
    assert list_steps(tmp_path) == [3, 6, 9, 12]
    assert threads <= {threading.get_ident()}
    assert bool(threads) == (hook != "on_batch_end")  # which Keras's `fit` calls for no callback that ends batches


def test_the_older_hook_of_a_subclass_is_called_when_a_batch_begins(tmp_path: Path) -> None:
    class Older(ModelCheckpoint):
        def on_batch_begin(self, batch: int, logs: Any = None) -> None:
            begun.append(batch)
            super().on_batch_begin(batch, logs)

    begun: list[int] = []
    fit(make_model(), [Older(tmp_path / "{step}", save_freq=3)], epochs=1)
    assert begun == list(range(BATCHES))
    assert list_steps(tmp_path) == [3, 6]


KEPT = [
    *(("on_train_begin", False), ("on_train_batch_begin", False), ("on_test_begin", False), ("on_train_begin", True)),
    *(
        pytest.param(f"on_{name}", False, marks=pytest.mark.campaign)
        for name in ("epoch_begin", "batch_begin", "epoch_end")
    ),
]


@pytest.mark.parametrize(("hook", "is_bare"), KEPT)
def test_a_subclass_that_keeps_a_hook_to_itself_saves_what_stock_s_would(
    hook: str, is_bare: bool, tmp_path: Path
) -> None:
    """Without our hook, batches were counted and snapshots taken on threads of Keras's pool."""
    import threading

    threads = set()

    class Mine(ModelCheckpoint):
        def _save_model(self, epoch: int, batch: int | None, logs: Any) -> None:
            threads.add(threading.get_ident())
            super()._save_model(epoch, batch, logs)

    kept = {hook: lambda self, *_, **__: None}
    stock = type("Theirs", (StockRecord,), kept)(save_freq=3)
    stock._current_epoch = 0  # stock fails without
    ours = type("Silent", (Mine,), kept)(tmp_path / "{step}", save_freq=3)
    fit(make_model(), [stock], validation_data=make_data())
    fit(make_model(), ours if is_bare else [ours], validation_data=make_data())
    assert list_steps(tmp_path) == [iterations(state) for state in stock.states] == [3, 6, 9, 12]
    for state in stock.states:
        assert_same(read_step(tmp_path / str(iterations(state))), state)
    assert threads == {threading.get_ident()}


def test_a_subclass_that_keeps_the_beginning_to_itself_cannot_resume_and_is_told(tmp_path: Path) -> None:
    kept = {"on_train_begin": lambda self, logs=None: None}
    ours = type("Silent", (ModelCheckpoint,), kept)(tmp_path / "{step}", resume=True)
    backup = type("Quiet", (BackupAndRestore,), kept)(tmp_path)
    assert not ours.async_safe
    assert not backup.async_safe
    for callback in (ours, backup):
        with pytest.raises(RuntimeError, match=r"on_train_begin did not come.*super\(\).on_train_begin"):
            fit(make_model(), [callback])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
def test_a_comparison_of_the_user_s_own_decides(tmp_path: Path) -> None:
    ours = ModelCheckpoint(tmp_path / "{step}", "score", save_best_only=True, mode="min")
    ours.monitor_op = np.greater
    report = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.update(score=[3.0, 2.0, 4.0, float("nan")][epoch])
    )
    with pytest.warns(UserWarning, match="score is nan: such a value is never the best"):
        fit(make_model(), [report, ours], epochs=4)
    assert list_steps(tmp_path) == [7, 21]


# ------------------------------------------------------------------------------------------------ driven by hand


def drive(model: Model, callbacks: Any, begin: str, end: str) -> None:  # a CallbackList
    callbacks.on_train_begin()
    for epoch in range(2):
        callbacks.on_epoch_begin(epoch)
        for batch in range(3):
            getattr(callbacks, begin)(batch)
            logs = model.train_on_batch(*make_data(2), return_dict=True)
            getattr(callbacks, end)(batch, logs)
        callbacks.on_epoch_end(epoch, logs)
    callbacks.on_train_end()


def combine_names() -> Iterator[Any]:  # of pytest
    names = product(("on_train_batch_begin", "on_batch_begin"), ("on_train_batch_end", "on_batch_end"), (True, False))
    for begin, end, is_asynchronous in names:
        is_chosen = begin == "on_batch_begin" and is_asynchronous == (end == "on_batch_end")
        yield pytest.param(begin, end, is_asynchronous, marks=() if is_chosen else pytest.mark.campaign)


@pytest.mark.parametrize(("begin", "end", "is_asynchronous"), list(combine_names()))
def test_older_names_of_hooks_are_the_same_hooks(begin: str, end: str, is_asynchronous: bool, tmp_path: Path) -> None:
    stock, ours = StockRecord(save_freq=2), ModelCheckpoint(tmp_path / "{step}", save_freq=2)
    model = make_model()
    drive(model, keras.callbacks.CallbackList([stock], model=model), "on_train_batch_begin", "on_train_batch_end")
    others = [] if is_asynchronous else [keras.callbacks.TerminateOnNaN()]
    model = make_model()
    drive(model, keras.callbacks.CallbackList([*others, ours], model=model, epochs=2), begin, end)
    assert ours.params == {"epochs": 2}
    assert ours.model is model
    assert list_steps(tmp_path) == [iterations(state) for state in stock.states] == [2, 4, 6]
    for state in stock.states:
        assert_same(read_step(tmp_path / str(iterations(state))), state)


def test_evaluating_and_predicting_with_the_callback_saves_nothing(tmp_path: Path) -> None:
    ours, model = ModelCheckpoint(tmp_path / "{step}", save_freq=1), make_model()
    model.evaluate(*make_data(), callbacks=[ours], verbose=0)
    model.predict(make_data()[0], callbacks=[ours], verbose=0)
    assert list_steps(tmp_path) == []


def test_a_model_of_the_same_shape_is_not_taken_for_the_other_one(tmp_path: Path) -> None:
    def make(name: str) -> Model:
        inputs = keras.layers.Input((2,))
        return keras.Model(inputs, keras.layers.Dense(1, name=name)(inputs))

    ours = ModelCheckpoint(tmp_path / "{step}", save_weights_only=True)
    for epoch, name in enumerate(("one", "two")):
        ours.set_model(model := make(name))
        ours.on_epoch_end(epoch, {})
        ours.wait_until_finished()
        (step,) = list_steps(tmp_path)
        state = read_step(tmp_path / str(step))
        assert np.array_equal(state[f"trainable_variables/{name}/kernel"], model.get_layer(name).kernel)
    ours.on_train_end()


@pytest.mark.parametrize("name", ["best.keras", "best.weights.h5"])
def test_a_private_file_is_for_its_owner_only(name: str, tmp_path: Path) -> None:
    is_weights = name.endswith(".weights.h5")
    fit(make_model(), [ModelCheckpoint(tmp_path / name, private=True, save_weights_only=is_weights)], epochs=1)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "filepath", ["file:///tmp/x/{step}", "s3:///{step}", "s3://{step}/run", "s3://bucket/a//{step}", "gs://bucket?x=1"]
)
def test_an_address_is_refused_rather_than_taken_for_a_directory(
    filepath: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Received: " + re.escape(filepath)):
        ModelCheckpoint(filepath)
    with pytest.raises(ValueError, match=r"layout='local' is for disks, .*\. Received: gs:"):
        BackupAndRestore("gs://bucket/b", layout="local")
    with pytest.raises(ValueError, match="Received: file:///tmp/x"):
        Checkpointer("file:///tmp/x")
    assert not list(tmp_path.iterdir())


def test_names_with_a_colon_are_no_addresses(tmp_path: Path) -> None:
    fit(make_model(), [ModelCheckpoint(tmp_path / "a:b" / "{step}")], epochs=1)
    assert list_steps(tmp_path / "a:b") == [7]


def test_steps_that_stay_the_same_are_told_once(tmp_path: Path) -> None:
    class TwoPlayers(keras.Model):
        """Does not count in the optimizer that it is compiled with, as a GAN with two of its own does not."""

        def __init__(self) -> None:
            super().__init__(name="players")
            self.layer = keras.layers.Dense(1, name="only")

        def call(self, x: Any) -> Any:
            return self.layer(x)

        def train_step(self, state: Any, data: Any) -> Any:
            return {"loss": 0.0}, state

    model = TwoPlayers()
    model.compile("sgd", "mse")
    model(make_data()[0])
    with pytest.warns(UserWarning, match="step of two saves is 0, though 7 batches were trained") as told:
        fit(model, [ModelCheckpoint(tmp_path / "{step}", save_weights_only=True)], epochs=4)
    assert len([each for each in told if "step of two saves" in str(each.message)]) == 1
    assert list_steps(tmp_path) == [0]
    fit(model, [ModelCheckpoint(tmp_path / "e" / "{epoch}", save_weights_only=True)], epochs=2)
    assert sorted(path.name for path in (tmp_path / "e").iterdir() if path.is_dir()) == ["1", "2"]
