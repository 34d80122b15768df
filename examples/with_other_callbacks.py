"""Checkpoints beside early stopping, logging and a learning-rate schedule, of a MiniVGGNet on handwritten digits.

python examples/with_other_callbacks.py run    into the directory `run`
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
from digits import fit

from offstep import ModelCheckpoint

Checkpoint = Callable[..., keras.callbacks.ModelCheckpoint]


def decay(epoch: int, rate: float) -> float:
    """Returns the learning rate of an epoch: from the second on, a tenth less than before."""
    return rate * 0.9 if epoch else rate


def make_logger(directory: Path) -> keras.callbacks.Callback:
    """Returns a TensorBoard logger, or one that writes a table where TensorFlow or TensorBoard is missing."""
    if all(importlib.util.find_spec(name) is not None for name in ("tensorflow", "tensorboard")):
        return keras.callbacks.TensorBoard(directory / "logs")
    return keras.callbacks.CSVLogger(directory / "log.csv")


def train(
    directory: Path, make_checkpoint: Checkpoint = ModelCheckpoint, *, epochs: int = 30, rows: int | None = None
) -> keras.callbacks.History:
    """Trains on the first `rows` images until that helps no longer; when it returns, all files are there."""
    directory.mkdir(parents=True, exist_ok=True)
    callbacks = [
        keras.callbacks.EarlyStopping("val_loss", patience=3, restore_best_weights=True),
        keras.callbacks.LearningRateScheduler(decay),
        make_logger(directory),
        make_checkpoint(directory / "epoch-{epoch:02d}.keras"),
        make_checkpoint(directory / "best.weights.h5", save_best_only=True, save_weights_only=True, verbose=1),
    ]
    return fit(callbacks, epochs=epochs, rows=rows)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
