"""One of several training processes: trains a Keras model over all of them with a backup, until it is finished.

Arguments as for `joint_trees`; without a `"saver"` in the options there is no backup. Each process has data, and an
order of them, of its own. Prints a line before each batch; then, as JSON, the digests of all that it is left with.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from joint_keras import distribute, find_data_group
from joint_trees import connect
from spread_model import list_variables, make_model

from offstep import BackupAndRestore, ModelCheckpoint

BATCHES, BATCH_SIZE, EPOCHS = 5, 8, 3


class Announce(keras.callbacks.Callback):
    """Says that a batch begins; at one of them only when all saves before it are durable."""

    def __init__(self, savers: list[Any], settles_at: int | None) -> None:
        super().__init__()
        self.savers, self.settles_at, self.batches = savers, settles_at, 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.batches += 1
        if self.batches == self.settles_at:
            [saver] = self.savers
            saver.wait_until_finished()
        print("batch", batch, flush=True)


class Tally(keras.callbacks.Callback):
    """Keeps what only its own process knows."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = 0.0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.sum += float(np.random.random())


def make_saver(directory: Path, options: dict[str, Any]) -> list[Any]:
    arguments = options.get("arguments", {})
    if options.get("saver") == "backup":
        return [BackupAndRestore(options.get("backup_dir", directory / "root"), **arguments)]
    if options.get("saver") == "checkpoint":
        filepath = options.get("filepath", directory / "root" / "{step}")
        if options.get("has_tiers"):
            arguments = arguments | {"local": directory / "root"}
        return [ModelCheckpoint(filepath, resume=True, **arguments)]
    return []


def train(directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    model = make_model()
    group = find_data_group(options["kind"])
    data = np.random.default_rng(group).random((BATCHES * BATCH_SIZE + 16, 8), "float32")
    np.random.seed(100 + group)
    early = keras.callbacks.EarlyStopping("val_loss", patience=3)
    reduce = keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=0.2)
    tally, savers = Tally(), make_saver(directory, options)
    history = model.fit(
        data[:-16],
        data[:-16],
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        validation_data=(data[-16:], data[-16:]),
        validation_batch_size=BATCH_SIZE,
        callbacks=[*savers, early, reduce, tally, Announce(savers, options.get("settles_at"))],
        verbose=0,
    )
    decisions = [early.wait, early.best, early.stopped_epoch, reduce.wait, reduce.best, tally.sum]
    return {
        "state": digest(list_parts(model)),
        "history": {name: [float(value).hex() for value in values] for name, values in history.history.items()},
        "epochs": history.epoch,
        "decisions": [float(value).hex() for value in decisions],
        "random": digest([np.random.bytes(8)]),
    }


def list_parts(model: Any) -> Iterable[bytes]:
    return (
        np.asarray(shard.data).tobytes()
        for variable in list_variables(model)
        for shard in variable.value.addressable_shards
    )


def digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


if __name__ == "__main__":
    process, count, port, folder, text = sys.argv[1:]
    settings = json.loads(text)
    if int(count) > 1:
        connect(int(process), int(count), port)
    if settings.get("is_on_hosts"):
        folder = f"{folder}/host_{process}"
    os.makedirs(folder, exist_ok=True)
    distribute(settings["kind"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = train(Path(folder), settings)
    report["said"] = [str(each.message) for each in caught if each.category in (RuntimeWarning, UserWarning)]
    print(json.dumps(report), flush=True)
