"""A file for every improvement of the validation loss, of a MiniVGGNet on handwritten digits.

python examples/every_improvement.py weights    into the directory `weights`
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
from digits import fit

from offstep import ModelCheckpoint

Checkpoint = Callable[..., keras.callbacks.ModelCheckpoint]


def train(
    directory: Path, make_checkpoint: Checkpoint = ModelCheckpoint, *, epochs: int = 15, rows: int | None = None
) -> keras.callbacks.History:
    """Trains on the first `rows` images; when it returns, all files are there."""
    checkpoint = make_checkpoint(
        directory / "weights-{epoch:03d}-{val_loss:.4f}.weights.h5",
        monitor="val_loss",
        mode="min",
        save_best_only=True,
        save_weights_only=True,
        verbose=1,
    )
    return fit([checkpoint], epochs=epochs, rows=rows)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
