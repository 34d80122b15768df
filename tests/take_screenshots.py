"""Takes the pictures of the documentation: python take_screenshots.py DIRECTORY. Run by `scripts/screenshots`.

A real training with a model of some 60 MB of state, saved every 15 batches and stopped in the middle by an exception,
as a job that dies; then `offstep report`, and a real browser.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import keras
from browser import Theme, open_browser
from digits import load_data

from offstep import ModelCheckpoint, cli

WIDTH_PIXELS, PHONE_PIXELS = 1280, 390
_EPOCHS, _DIES_IN_EPOCH, _DIES_AT_BATCH = 8, 7, 37


class Dies(keras.callbacks.Callback):
    """Ends a training in the middle of an epoch."""

    async_safe = True
    epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if (self.epoch, batch) == (_DIES_IN_EPOCH - 1, _DIES_AT_BATCH):
            raise InterruptedError


def build_model() -> keras.Model:
    """Returns a compiled network of about 5 million weights."""
    layers = [keras.layers.Dense(1500, activation="relu") for _ in range(3)]
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), *layers, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model


def train() -> None:
    """Writes `ckpts` and `offstep-events.jsonl` into the working directory."""
    # One step after the other, as where a device's queue is short. Else JAX dispatches all batches from one save to the
    # next at once; then their times tell little, and the report says so.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    (images, labels), test = load_data()
    callback = ModelCheckpoint("ckpts/{step}", save_freq=15, max_to_keep=4, event_log="offstep-events.jsonl")
    try:
        build_model().fit(images, labels, 16, _EPOCHS, callbacks=[callback, Dies()], validation_data=test, verbose=2)
    except InterruptedError:
        callback.wait_until_finished()


def take_pictures(directory: Path) -> None:
    """Takes the report in the working directory: all of it, and its upper part on a phone."""
    cases: list[tuple[int, Theme, float]] = [
        (WIDTH_PIXELS, "light", 1800),
        (WIDTH_PIXELS, "dark", 1800),
        (PHONE_PIXELS, "light", 1420),
        (PHONE_PIXELS, "dark", 1420),
    ]
    with open_browser() as browser:
        for width, theme, height in cases:
            browser.show(Path("offstep-report.html"), width=width, theme=theme)
            target = directory / f"report-{width}-{theme}.png"
            browser.take_picture(target, clip={"x": 0, "y": 0, "width": width, "height": height})
            print(f"{target}: {target.stat().st_size:,} bytes")
        assert browser.problems == [], browser.problems


def main(directory: Path) -> int:
    """Takes all pictures."""
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        train()
        code = cli.main(["report", "offstep-events.jsonl"])
        take_pictures(directory)
        os.chdir(directory)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))
