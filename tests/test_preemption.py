"""SIGTERM while Keras trains: what there is gets saved and durable, then the signal does what it would have done."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from interpreters import Interpreter
from processes import PATIENCE_SECONDS, wait_for_end
from runs import iterations, list_steps, read_step

from offstep import ModelCheckpoint

PRELUDE = f"""
import os, signal, sys, threading
sys.path.insert(0, {str(Path(__file__).parent)!r})
from processes import find_writers
from runs import *
from offstep import ModelCheckpoint

root = sys.argv[1]

def tell(*words):
    print(*words, flush=True)

class Batches(keras.callbacks.Callback):
    "Announces a batch and, from then on, waits for the signal in each."

    async_safe = "synchronous" not in sys.argv[2:]

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 3:
            tell("batch", *[writer.pid for writer in find_writers()])
            sys.stdin.readline()

class Validation(keras.callbacks.Callback):
    def on_test_batch_begin(self, batch, logs=None):
        if batch == 1:
            tell("validation")
            sys.stdin.readline()

class Nothing(keras.callbacks.Callback):
    "Switches Keras's asynchronous dispatch off."

    def on_train_batch_end(self, batch, logs=None):
        pass

def train(ours, *others, **options):
    synchronous = [Nothing()] if "synchronous" in sys.argv[2:] else []
    fit(make_model(), [*synchronous, Batches(), ours, *others], **options)
"""


@contextmanager
def running(script: str, *arguments: str) -> Iterator[Interpreter]:
    trainer = Interpreter(
        ["-c", PRELUDE + script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield trainer
    finally:
        trainer.kill()
        trainer.communicate()


def hear(trainer: Interpreter) -> list[str]:
    assert trainer.stdout is not None
    line = trainer.stdout.readline().split()
    assert line, trainer.communicate()[1]
    return line


def send_sigterm(trainer: Interpreter) -> None:
    """Sends the signal to a trainer that waits for a line, which it gets after that."""
    trainer.send_signal(signal.SIGTERM)
    assert trainer.stdin is not None
    trainer.stdin.write("go on\n")
    trainer.stdin.flush()


def end(trainer: Interpreter) -> tuple[int, str]:
    _, err = trainer.communicate(timeout=PATIENCE_SECONDS)
    return trainer.returncode, err


# Where Keras tells of a batch's end on another thread, the state is saved when the next one begins.
@pytest.mark.parametrize(("dispatch", "step"), [("asynchronous", 3), ("synchronous", 4)])
def test_the_state_at_the_end_of_the_batch_is_durable_before_the_process_ends_by_the_signal(
    dispatch: str, step: int, tmp_path: Path
) -> None:
    script = 'train(ModelCheckpoint(root + "/{step}", save_freq=1000, save_on_preemption=True))'
    with running(script, str(tmp_path), dispatch) as trainer:
        _, writer = hear(trainer)
        send_sigterm(trainer)
        assert end(trainer) == (-signal.SIGTERM, "")
        wait_for_end(int(writer))
    assert list_steps(tmp_path) == [step]
    assert iterations(read_step(tmp_path / str(step))) == step


def test_the_handler_that_was_there_before_gets_the_signal_after_the_save(tmp_path: Path) -> None:
    script = """
def leave(number, frame):
    tell("earlier handler", *list_steps(Path(root)))
    sys.exit(7)

signal.signal(signal.SIGTERM, leave)
first, second = root + "/{step}", os.path.dirname(root) + "/other/{step}"
options = {"save_freq": 3, "save_on_preemption": True}
train(ModelCheckpoint(first, **options), ModelCheckpoint(second, **options))
"""
    root = tmp_path / "root"
    with running(script, str(root)) as trainer:
        hear(trainer)
        send_sigterm(trainer)
        assert hear(trainer) == ["earlier", "handler", "3"]
        status, err = end(trainer)
        assert status == 7, err
    assert list_steps(root) == list_steps(tmp_path / "other") == [3]


def test_training_goes_on_after_the_save_where_the_earlier_handler_lets_it(tmp_path: Path) -> None:
    script = """
signal.signal(signal.SIGTERM, lambda number, frame: tell("noted"))
train(ModelCheckpoint(root + "/{step}", save_freq=1000, save_on_preemption=True))
tell("end of fit", list_steps(Path(root)))
signal.raise_signal(signal.SIGTERM)
"""
    with running(script, str(tmp_path)) as trainer:
        for _ in range(2):  # epochs
            hear(trainer)
            send_sigterm(trainer)
            assert hear(trainer) == ["noted"]
        assert " ".join(hear(trainer)) == "end of fit [3, 10]"
        assert hear(trainer) == ["noted"]
        assert end(trainer)[0] == 0


def test_a_signal_in_the_validation_saves_what_the_epoch_has_trained(tmp_path: Path) -> None:
    script = """
x, y = make_data()
ours = ModelCheckpoint(root + "/{step}", save_on_preemption=True)
fit(make_model(), [ours, Validation()], validation_data=(x, y), validation_batch_size=2)
"""
    with running(script, str(tmp_path)) as trainer:
        assert hear(trainer) == ["validation"]
        send_sigterm(trainer)
        assert end(trainer) == (-signal.SIGTERM, "")
    assert list_steps(tmp_path) == [7]
    assert iterations(read_step(tmp_path / "7")) == 7


def test_without_a_fit_that_runs_the_signal_acts_at_once(tmp_path: Path) -> None:
    """A `fit` that ended in an exception never said so."""
    script = """
class Broken(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if batch == 3:
            raise ZeroDivisionError

ours = ModelCheckpoint(root + "/{step}", save_freq=2, save_on_preemption=True)
try:
    fit(make_model(), [ours, Broken()])
except ZeroDivisionError:
    ours.wait_until_finished()
tell("failed")
sys.stdin.readline()
tell("still there")
"""
    with running(script, str(tmp_path)) as trainer:
        assert hear(trainer) == ["failed"]
        send_sigterm(trainer)
        assert end(trainer)[0] == -signal.SIGTERM
    assert list_steps(tmp_path) == [2]


def test_a_disk_that_hangs_does_not_keep_the_process_longer_than_it_was_given(tmp_path: Path) -> None:
    script = """
class Hang(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if batch == 3:
            [writer] = find_writers()
            writer.suspend()

ours = ModelCheckpoint(root + "/{step}", save_freq=2, save_on_preemption=True, preemption_seconds=0.5)
train(ours, Hang())
"""
    with running(script, str(tmp_path)) as trainer:
        _, writer = hear(trainer)
        send_sigterm(trainer)
        status, err = end(trainer)
        assert status == -signal.SIGTERM
        os.kill(int(writer), signal.SIGCONT)
        wait_for_end(int(writer))  # which makes durable what it was given
    assert list_steps(tmp_path) == [2, 3]
    assert err == "" or "offstep: at SIGTERM: step 3 is not durable after" in err


def test_after_fit_and_in_forked_children_sigterm_is_what_it_was(tmp_path: Path) -> None:
    script = """
import warnings
warnings.simplefilter("ignore")

class Fork(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        tell("in fit", signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        tell("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

x, y = make_data(2)
fit(make_model(), [ModelCheckpoint(root + "/{step}", save_on_preemption=True), Fork()], x=x, y=y, epochs=1)
tell("after", signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
threads = []
def elsewhere():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(make_model(), [ModelCheckpoint(root + "/{step}", save_on_preemption=True)], x=x, y=y, epochs=1)
    tell(*{str(w.message) for w in told if "preemption" in str(w.message)})
thread = threading.Thread(target=elsewhere)
thread.start()
thread.join()
"""
    with running(script, str(tmp_path)) as trainer:
        assert hear(trainer) == ["in", "fit", "False"]
        assert hear(trainer) == ["child", str(-signal.SIGTERM)]
        assert hear(trainer) == ["after", "True"]
        assert " ".join(hear(trainer)) == (
            "save_on_preemption does nothing here: training does not run on the main thread."
        )
        assert end(trainer)[0] == 0


BAD: list[tuple[dict[str, Any], str]] = [
    ({"save_best_only": True}, r"saves what there is, not the best\. Received: save_best_only=True"),
    (
        {"filepath": "ckpts/{step}-{loss:.2f}"},
        r"no other fields than epoch, .* Received: filepath=ckpts/",
    ),
    ({"preemption_seconds": 0}, r"preemption_seconds must be a positive number\. Received: 0"),
    ({"preemption_seconds": "25"}, r"preemption_seconds must be .* Received: '25'"),
]


@pytest.mark.parametrize(("options", "text"), BAD, ids=[str(options) for options, _ in BAD])
def test_what_cannot_be_saved_at_any_batch_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ModelCheckpoint(**({"filepath": "ckpts/{step}", "save_on_preemption": True} | options))
