"""One file that is overwritten again and again while trainer and writer are killed: old or new, but whole."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE
from typing import Any

import keras
import numpy as np
import pytest
from interpreters import Interpreter
from keras import layers
from processes import wait_for_end

from offstep.formats import FORMATS
from offstep.keras_formats import ARCHIVE, WEIGHTS, describe_form
from offstep.keras_state import live_arrays

pytestmark = pytest.mark.crash

Model = Any  # Keras carries no types
WIDTH = 400
SUFFIXES = {ARCHIVE: ".keras", WEIGHTS: ".weights.h5"}


def make_model() -> Model:
    keras.utils.clear_session()
    inputs = layers.Input((WIDTH,), name="inputs")
    x = layers.Dense(WIDTH, name="first")(inputs)
    model = keras.Model(inputs, layers.Dense(WIDTH, name="last")(x), name="overwritten")
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


@contextmanager
def overwriting(directory: Path, kind: str) -> Iterator[tuple[Interpreter, Path]]:
    """A trainer that overwrites one file, which exists already."""
    model = make_model()
    form = describe_form(model, live_arrays(model), kind, weights_only=False)
    plan = FORMATS[kind].place(form.leaves, form.empty_nodes)
    orders = directory / "orders.json"
    orders.write_text(json.dumps({"plan": plan.to_json(), "format": kind, "documents": form.documents}))
    target = directory / "files" / f"best{SUFFIXES[kind]}"
    target.parent.mkdir()
    script = Path(__file__).with_name("overwrite_file.py")
    trainer = Interpreter([script, orders, target], stdout=PIPE, start_new_session=True)
    try:
        yield trainer, target
    finally:
        with suppress(ProcessLookupError):
            os.killpg(trainer.pid, signal.SIGKILL)
        trainer.communicate()


def read_generation(path: Path, kind: str) -> int:
    """Loads the file with stock Keras; returns the number that all of it is filled with."""
    if kind == ARCHIVE:
        keras.utils.clear_session()
        model = keras.saving.load_model(path)
    else:
        model = make_model()
        model.load_weights(path)
    values = [np.asarray(variable.value) for variable in [*model.variables, *model.optimizer.variables]]
    found = {float(value) for array in values for value in np.unique(array)}
    assert len(found) == 1, found
    return int(found.pop())


def kill_while_overwriting(directory: Path, kind: str, seed: int) -> None:
    chance = random.Random(seed)
    with overwriting(directory, kind) as (trainer, target):
        assert trainer.stdout is not None
        for _ in range(2):
            durable, writer = map(int, trainer.stdout.readline().split())
        time.sleep(chance.random() * 0.05)  # not to wait for anything: this is the moment
        victims = [trainer.pid, writer]
        chance.shuffle(victims)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        wait_for_end(writer)
        for line in trainer.stdout.read().splitlines():
            durable = int(line.split()[0]) if len(line.split()) == 2 else durable
        assert read_generation(target, kind) in (durable, durable + 1)


@pytest.mark.parametrize("kind", SUFFIXES)
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_overwrite_leaves_the_old_or_the_new_file(kind: str, seed: int, tmp_path: Path) -> None:
    kill_while_overwriting(tmp_path, kind, seed)


@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", SUFFIXES)
def test_fifty_killed_overwrites_leave_fifty_whole_files(kind: str, tmp_path: Path) -> None:
    for seed in range(100, 150):
        directory = tmp_path / str(seed)
        directory.mkdir()
        kill_while_overwriting(directory, kind, seed)
