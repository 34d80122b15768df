"""A plugin for pytest that puts our class in the place of Keras's before Keras's own tests are collected."""

from __future__ import annotations

from typing import Any

import keras
from keras.src import callbacks

from offstep import ModelCheckpoint, shared_writer

callbacks.ModelCheckpoint = keras.callbacks.ModelCheckpoint = ModelCheckpoint


def pytest_configure(config: Any) -> None:  # of pytest
    config.addinivalue_line("markers", "requires_trainable_backend: of Keras")
    shared_writer.borrow_shared()  # one for all of them: to start it takes longer than most of these tests


def pytest_unconfigure() -> None:
    shared_writer.return_shared()
