"""One file with the best model so far, of a MiniVGGNet on handwritten digits; at the end stock Keras restores it.

python examples/best_only.py best.keras
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
from digits import fit, load_data

from offstep import ModelCheckpoint

Checkpoint = Callable[..., keras.callbacks.ModelCheckpoint]


def train(
    filepath: Path, make_checkpoint: Checkpoint = ModelCheckpoint, *, epochs: int = 15, rows: int | None = None
) -> keras.callbacks.History:
    """Trains on the first `rows` images; when it returns, the file is there."""
    checkpoint = make_checkpoint(filepath, monitor="val_accuracy", save_best_only=True, verbose=1)
    return fit([checkpoint], epochs=epochs, rows=rows)


def main(filepath: Path) -> None:
    history = train(filepath).history
    images, labels = load_data()[1]
    _, accuracy = keras.saving.load_model(filepath).evaluate(images, labels, verbose=0)
    print(f"accuracy of the best epoch {max(history['val_accuracy']):.4f}, of the restored model {accuracy:.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
