"""Trains with a snapshot in memory after every batch, and kills itself.

python keep_in_memory.py DIRECTORY BATCH [ADDRESS]

It dies before that batch, counted from the start; never where it is -1. Prints what it was told, and at its end a
digest of the state. With the address of a store, every fourth step is saved and copied there, and it prints its
writer's process id before it dies.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
from processes import find_writers

from offstep import ModelCheckpoint

BATCHES = 12


class Die(keras.callbacks.Callback):
    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch == self.batch:
            print(*(writer.pid for writer in find_writers()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    directory, batch = sys.argv[1], int(sys.argv[2])
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Input((6,)), keras.layers.Dense(8), keras.layers.Dropout(0.2), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile("adam", "mse")
    rows = np.linspace(-1, 1, 4 * BATCHES * 6, dtype="float32").reshape(-1, 6)
    options: dict[str, Any] = {"filepath": f"{directory}/{{step}}", "save_freq": 1000, "memory_linger": "60s"}
    if len(sys.argv) > 3:
        options = {"filepath": f"{sys.argv[3]}/{{step}}", "save_freq": 4, "memory_linger": "1s"}
        options |= {"local": directory, "retry_seconds": 300}
    saver = ModelCheckpoint(verbose=1, memory_every=1, resume=True, **options)
    model.fit(rows, rows[:, :1], batch_size=4, verbose=0, callbacks=[saver, Die(batch)])
    values = [np.asarray(variable.value).tobytes() for variable in [*model.variables, *model.optimizer.variables]]
    print(hashlib.sha256(b"".join(values)).hexdigest())


if __name__ == "__main__":
    main()
