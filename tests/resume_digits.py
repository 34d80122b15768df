"""Trains on digits with a backup; started again by the same command until it is finished.

python resume_digits.py MODE EPOCHS DIRECTORY      MODE is a key of MODES; without DIRECTORY there is no backup
Prints a line before each batch; then the digests of all that the training has left, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
from keras import layers

from offstep import BackupAndRestore

BATCHES = 12

MODES: dict[str, dict[str, Any]] = {
    "epoch": {"save_freq": "epoch"},
    "batch": {"save_freq": 1},
    "execution": {"save_freq": 3, "steps_per_execution": 3},
    "accumulation": {"save_freq": 1, "gradient_accumulation_steps": 4},
    "memory": {"save_freq": "epoch", "memory_every": 1},
}


class Announce(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        print("batch", batch, flush=True)


def build_model(steps_per_execution: int = 1, gradient_accumulation_steps: int | None = None) -> keras.Model:
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.GaussianNoise(0.1),  # layers that move images are not compiled by Keras, nor is a model with them
            layers.Conv2D(8, 3),
            layers.BatchNormalization(),
            layers.Activation("relu"),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(10, activation="softmax"),
        ]
    )
    optimizer = keras.optimizers.Adam(0.003, gradient_accumulation_steps=gradient_accumulation_steps)
    model.compile(
        optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"], steps_per_execution=steps_per_execution
    )
    return model


def read_digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads what `sklearn.datasets.load_digits` does; to import that takes longer than all else before training."""
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(file, delimiter=",", max_rows=count)
    return (rows[:, :-1] / 16.0).astype("float32").reshape(-1, 8, 8, 1), rows[:, -1].astype(int)


def train(mode: str, epochs: int, directory: str | None) -> dict[str, Any]:
    images, labels = read_digits(500)
    options = dict(MODES[mode])
    how = {name: options.pop(name) for name in ("save_freq", "memory_every") if name in options}
    backup = [BackupAndRestore(directory, **how)] if directory else []
    model = build_model(**options)
    early = keras.callbacks.EarlyStopping("val_loss", patience=4, restore_best_weights=True)
    reduce = keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=0.2)
    history = model.fit(
        images[:384],
        labels[:384],
        batch_size=32,
        epochs=epochs,
        validation_data=(images[400:500], labels[400:500]),
        callbacks=[*backup, early, reduce, Announce()],
        verbose=0,
    )
    decisions = [early.wait, early.best, early.best_epoch, early.stopped_epoch, reduce.wait, reduce.best]
    weights = [array.tobytes() for array in early.best_weights]
    return {
        "state": digest(np.asarray(v.value).tobytes() for v in [*model.variables, *model.optimizer.variables]),
        "best weights": digest(weights),
        "history": {name: [float(value).hex() for value in values] for name, values in history.history.items()},
        "epochs": history.epoch,
        "decisions": [float(value).hex() for value in decisions],
        "random": digest([np.random.bytes(8)]),
    }


def digest(parts: Any) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


if __name__ == "__main__":
    mode, epochs, *directories = sys.argv[1:]
    print(json.dumps(train(mode, int(epochs), next(iter(directories), None))), flush=True)
