"""A MiniVGGNet on handwritten digits that is saved while it trains, restored by stock Keras, killed, and resumed.

python examples/digits.py                   the whole demonstration, in a temporary directory (--report keeps its page)
python examples/digits.py train ckpts       train, saving into ckpts/<step>; again after a kill: go on where it was
python examples/digits.py evaluate ckpts    load the newest with stock Keras and evaluate it
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

if TYPE_CHECKING:
    from offstep import ModelCheckpoint
    from offstep.records import SaveStats

BATCH_SIZE = 32
SAVE_EVERY = 5
EPOCHS = 2
TEST_SIZE = 359

# Past a save, short of the next one, and before the run is over.
KILL_AT_STEP = 72

Split = tuple[np.ndarray, np.ndarray]
Scores = dict[str, Any]


def load_data() -> tuple[Split, Split]:
    """Returns (images, labels) to train on and to test with; images are float32[n, 8, 8, 1] from 0 to 1."""
    digits = load_digits()
    images = (digits.images / 16.0).astype("float32")[..., np.newaxis]
    order = np.random.default_rng(7).permutation(len(images))
    test, train = order[:TEST_SIZE], order[TEST_SIZE:]
    return (images[train], digits.target[train]), (images[test], digits.target[test])


def add_block(x: keras.KerasTensor, filters: int) -> keras.KerasTensor:
    """Appends (Conv, BatchNorm, ReLU) twice, then pooling and dropout."""
    for _ in range(2):
        x = keras.layers.Conv2D(filters, 3, padding="same")(x)
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.Activation("relu")(x)
    x = keras.layers.MaxPooling2D()(x)
    return keras.layers.Dropout(0.25)(x)


def build_model() -> keras.Model:
    """Returns a compiled MiniVGGNet for 8 x 8 images."""
    inputs = keras.Input((8, 8, 1))
    x = add_block(add_block(inputs, 32), 64)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(512, activation="relu")(x)
    x = keras.layers.BatchNormalization(momentum=0.9)(x)
    x = keras.layers.Dropout(0.5)(x)
    model = keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(x))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def fit(callbacks: list[keras.callbacks.Callback], *, epochs: int, rows: int | None = None) -> keras.callbacks.History:
    """Trains a new model on the first `rows` images, and validates it on the test images after each epoch."""
    (images, labels), test = load_data()
    keras.utils.set_random_seed(7)
    return build_model().fit(
        images[:rows], labels[:rows], 64, epochs, callbacks=callbacks, validation_data=test, verbose=2
    )


def train(root: Path, *, announce_steps: bool = False) -> tuple[keras.Model, ModelCheckpoint]:
    """Trains to the end of the last epoch, from the newest checkpoint on; on return all checkpoints are durable."""
    # Only here, because `evaluate` shall restore with nothing but Keras.
    from offstep import ModelCheckpoint

    (images, labels), _ = load_data()
    keras.utils.set_random_seed(7)
    model = build_model()
    log = root.with_name(f"{root.name}-events.jsonl")
    checkpoint = ModelCheckpoint(f"{root}/{{step}}", save_freq=SAVE_EVERY, max_to_keep=5, resume=True, event_log=log)
    model.fit(
        images,
        labels,
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        callbacks=[checkpoint, announce()] if announce_steps else [checkpoint],
        verbose=0,
    )
    checkpoint.wait_until_finished()
    return model, checkpoint


def announce() -> keras.callbacks.Callback:
    """Returns a callback that prints how many steps this process has trained."""
    done = iter(range(1, sys.maxsize))
    return keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: print(next(done), flush=True))


def evaluate(model: keras.Model) -> Scores:
    """Returns the step of the model and how well it does on the test images."""
    images, labels = load_data()[1]
    scores = model.evaluate(images, labels, verbose=0, return_dict=True)
    return {"step": int(model.optimizer.iterations), **scores}


def digest(model: keras.Model) -> str:
    """Returns a checksum of all weights, the optimizer's state and the layers' random generators."""
    variables = [*model.variables, *model.optimizer.variables]
    return hashlib.sha256(b"".join(np.asarray(variable.value).tobytes() for variable in variables)).hexdigest()


def evaluate_newest(root: Path) -> Scores:
    """Evaluates the newest checkpoint as any Keras user would load it."""
    model = keras.saving.load_model(str(root))
    assert "offstep" not in sys.modules
    return evaluate(model)


def run_again(*arguments: str) -> Scores:
    """Runs this file in a fresh process and returns the scores that it prints last."""
    command = [sys.executable, __file__, *arguments]
    # Errors are kept back: Orbax warns at every restore that it reads the sharding from its own file.
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{finished.stderr}")
    scores: Scores = json.loads(finished.stdout.splitlines()[-1])
    return scores


def train_and_kill(root: Path) -> int:
    """Trains in a process of its own, ends it with SIGKILL, and returns the last step that it announced."""
    command = [sys.executable, __file__, "train", str(root), "--announce-steps"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        step = 0
        while step < KILL_AT_STEP:
            # No line is the end of the output: int() then fails, as it should.
            step = int(trainer.stdout.readline())
        trainer.kill()
        # It may have gone on between its line and the signal.
        steps = [step, *map(int, trainer.stdout)]
    return steps[-1]


def tabulate(saves: list[SaveStats]) -> Table:
    """Returns a table with a line per save, in milliseconds."""
    # Without `compute_seconds`: the rest of a step that was under way when the save began is training.
    table = Table(title="Saves", caption=f"median stall {median(s.stall_seconds for s in saves) * 1e3:.2f} ms")
    for heading in ("step", "stall ms", "durable after ms", "size MB"):
        table.add_column(heading, justify="right")
    for save in saves:
        durable = "-" if save.durable_seconds is None else f"{save.durable_seconds * 1e3:.1f}"
        table.add_row(f"{save.step}", f"{save.stall_seconds * 1e3:.2f}", durable, f"{save.state_bytes / 1e6:.2f}")
    return table


def describe(scores: Scores) -> str:
    return f"step {scores['step']}: accuracy {scores['accuracy']:.4f}, loss {scores['loss']:.6f}"


def show_restore(console: Console, root: Path) -> str:
    """Trains with saves, and compares the live model with what a fresh process restores; returns its digest."""
    console.rule(f"train, saving every {SAVE_EVERY} batches")
    model, checkpoint = train(root)
    console.print(tabulate(list(checkpoint.stats)))
    trained, live = digest(model), evaluate(model)
    restored = run_again("evaluate", str(root))
    console.print("in the process that trained     ", describe(live))
    console.print("fresh process, stock Keras only ", describe(restored))
    if (live["step"], live["accuracy"]) != (restored["step"], restored["accuracy"]):
        sys.exit("the restored model differs from the one that was saved")
    console.print("equal")
    return trained


def show_kill(console: Console, root: Path, expected: str) -> None:
    """Kills a training run in mid-epoch and starts it again; what comes out has to have the expected digest."""
    console.rule("kill -9 in the middle of an epoch, then the same command again")
    killed_at = train_and_kill(root)
    restored = run_again("evaluate", str(root))
    console.print(f"killed after step {killed_at}")
    console.print("newest checkpoint, stock Keras  ", describe(restored))
    finished = run_again("train", str(root))
    console.print("resumed, trained to the end     ", describe(finished))
    if not 0 < restored["step"] <= killed_at < finished["step"]:
        sys.exit("training did not continue from the newest checkpoint")
    if finished["digest"] != expected:
        sys.exit("the resumed training did not end as the one that was not killed")
    console.print("equal, bit for bit, to the run that was not killed")


def show_commands(console: Console, root: Path, page: Path | None) -> None:
    """Runs the command `offstep` on what the killed and resumed training has left."""
    page = page or root.with_name("report.html")
    for arguments in (
        ("ls", root),
        ("verify", root),
        ("report", root.with_name(f"{root.name}-events.jsonl"), page),
    ):
        console.rule(" ".join(["offstep", arguments[0], *(Path(argument).name for argument in arguments[1:])]))
        subprocess.run([sys.executable, "-m", "offstep", *map(str, arguments)], check=True)


def show_comparison(console: Console) -> None:
    """Trains the same network with offstep, and with Keras's own callbacks."""
    console.rule("the same training with other callbacks")
    subprocess.run([sys.executable, Path(__file__).with_name("compare.py")], check=True)


def show_all(page: Path | None) -> None:
    console = Console()
    with tempfile.TemporaryDirectory() as directory:
        expected = show_restore(console, Path(directory, "ckpts"))
        show_kill(console, Path(directory, "killed"), expected)
        show_commands(console, Path(directory, "killed"), page)
    show_comparison(console)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("train", "evaluate"))
    parser.add_argument("root", nargs="?", type=Path, help="directory of the checkpoints")
    parser.add_argument("--announce-steps", action="store_true", help="print every step that is done")
    parser.add_argument("--report", type=Path, help="where the page of the demonstration goes, and stays")
    options = parser.parse_args()
    if options.command is None:
        show_all(options.report)
    elif options.root is None:
        parser.error(f"{options.command} needs the directory of the checkpoints")
    elif options.command == "evaluate":
        print(json.dumps(evaluate_newest(options.root)))
    else:
        model, _ = train(options.root, announce_steps=options.announce_steps)
        trained = digest(model)  # before the evaluation counts in its metrics
        print(json.dumps(evaluate(model) | {"digest": trained}))


if __name__ == "__main__":
    main()
