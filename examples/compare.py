"""What do saves cost the same small training, with offstep and with Keras's own callbacks?

python examples/compare.py                  trains four times, each in a fresh process, and prints a table
python examples/compare.py offstep          trains once, and prints seconds and the number of saves

One run of each on a small network: enough to see the difference. `offstep bench` measures with care.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import keras

EVERY = 5
EPOCHS = 2
WARMUP_ROWS = 64
LABELS = {
    "none": "no callback",
    "offstep": "offstep",
    "model_checkpoint": "keras ModelCheckpoint",
    "orbax_checkpoint": "keras OrbaxCheckpoint",
}


def make_callbacks(peer: str, directory: str) -> list[keras.callbacks.Callback]:
    """Returns the callback that saves every few batches, and none for "none"."""
    import keras

    from offstep import ModelCheckpoint

    if peer == "offstep":
        return [ModelCheckpoint(f"{directory}/{{step}}", save_freq=EVERY, max_to_keep=1)]
    if peer == "model_checkpoint":
        return [keras.callbacks.ModelCheckpoint(f"{directory}/newest.keras", save_freq=EVERY)]
    if peer == "orbax_checkpoint":
        return [keras.callbacks.OrbaxCheckpoint(directory, save_freq=EVERY, max_to_keep=1)]
    return []


def train(peer: str) -> tuple[float, int]:
    """Returns the seconds of one training, compilation left out, until everything is saved; and how often it saves."""
    from digits import BATCH_SIZE, build_model, load_data

    (images, labels), _ = load_data()
    model = build_model()
    model.fit(images[:WARMUP_ROWS], labels[:WARMUP_ROWS], BATCH_SIZE, verbose=0)
    rows = len(images) // BATCH_SIZE * BATCH_SIZE
    with tempfile.TemporaryDirectory() as directory:
        callbacks = make_callbacks(peer, directory)
        started = time.perf_counter()
        model.fit(images[:rows], labels[:rows], BATCH_SIZE, EPOCHS, verbose=0, callbacks=callbacks)
        return time.perf_counter() - started, rows // BATCH_SIZE * EPOCHS // EVERY


def run(peer: str) -> tuple[float, int]:
    """Trains in a fresh process; see `train`."""
    environment = os.environ | {"KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"}
    ended = subprocess.run(
        [sys.executable, __file__, peer], env=environment, capture_output=True, text=True, check=False
    )
    if ended.returncode != 0:
        sys.exit(f"{peer} failed:\n{ended.stderr}")
    seconds, saves = ended.stdout.split()
    return float(seconds), int(saves)


def compare(console: Console) -> None:
    """Prints a line for each way to save."""
    without, saves = run("none")
    table = Table(title=f"{saves} saves, one every {EVERY} batches")
    for heading in ("", "training, s", "longer by, s", "for each save, ms"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row(LABELS["none"], f"{without:.2f}", "", "")
    for peer in list(LABELS)[1:]:
        seconds, _ = run(peer)
        more = seconds - without
        table.add_row(LABELS[peer], f"{seconds:.2f}", f"{more:.2f}", f"{more / saves * 1e3:.0f}")
    console.print(table)


def main() -> None:
    if len(sys.argv) > 1:
        print(*train(sys.argv[1]))
    else:
        compare(Console())


if __name__ == "__main__":
    main()
