"""The `fit` that is running: its callbacks, its first epoch, and the iterator over its data.

Keras tells a callback none of these, so they are looked up on the call stack. Where this Keras has them elsewhere,
`find_fit` finds nothing, and an interrupted epoch is started again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

from offstep.keras_data import DataPosition, is_known

Model = Any  # Keras carries no types
Callback = Any

NO_EPOCH_LEFT = 1 << 62


@dataclass(frozen=True)
class RunningFit:
    """What is known of a `fit`.

    Attributes:
        callbacks: Keras's list of all callbacks; the live one.
        data: The position in the data; `None` where this Keras does not show it.
    """

    callbacks: list[Callback]
    data: DataPosition | None


def find_fit(model: Model) -> RunningFit | None:
    """Returns the `fit` of `model` that called the caller; `None` in a loop driven by hand, or with another Keras."""
    code = getattr(inspect.unwrap(keras.Model.fit), "__code__", None)
    frame = inspect.currentframe()
    while frame is not None and not (frame.f_code is code and frame.f_locals.get("self") is model):
        frame = frame.f_back
    if frame is None:
        return None
    callbacks = getattr(frame.f_locals.get("callbacks"), "callbacks", None)
    iterator = frame.f_locals.get("epoch_iterator")
    if not isinstance(callbacks, list):
        return None
    return RunningFit(callbacks, DataPosition(model, iterator) if is_known(iterator) else None)


def set_initial_epoch(model: Model, epoch: int | None) -> None:
    """Makes the `fit` that is about to begin start with `epoch` (from 0), as stock `BackupAndRestore` does."""
    model._initial_epoch = epoch


class AfterAll(keras.callbacks.Callback):  # type: ignore[misc]  # Keras carries no types
    """Runs a function once all callbacks of a list have begun the training; then it leaves the list.

    A list that is being iterated over is extended while it is, which Python defines: what is appended comes last.
    """

    def __init__(self, callbacks: list[Callback], run: Callable[[], None]) -> None:
        super().__init__()
        self._callbacks, self._run = callbacks, run
        callbacks.append(self)

    def on_train_begin(self, logs: object = None) -> None:
        """Runs the function."""
        self._callbacks.remove(self)
        self._run()
