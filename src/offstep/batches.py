"""Which batches have ended, and at which step that is, on whichever thread Keras tells it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

Logs = Mapping[str, Any]  # floats, or whatever another callback put there

LOGS_TIMEOUT_SECONDS = 120.0
"""How long the logs of a computed batch may take through Keras's pool, other callbacks' hooks included."""


class StepCounter:
    """Follows the optimizer's counter of batches on the host, so that naming a checkpoint needs no device."""

    def __init__(self) -> None:
        self.batches = 0
        self.counted = 0  # in this process, whatever the optimizer says
        self.divisor = 1
        self.last_batch = -1

    @property
    def current(self) -> int:
        """The step: batches whose gradients are accumulated are one."""
        return self.batches // self.divisor

    def begin_epoch(self) -> None:
        """The next batch is the first one again."""
        self.last_batch = -1

    def correct(self, batches: int | None) -> None:
        """Takes over what was read from the optimizer, if it has a counter."""
        if batches is not None:
            self.batches = batches

    def count(self, batch: int) -> None:
        """Counts up to `batch`, which is 0-based in its epoch."""
        ended = batch - self.last_batch if batch > self.last_batch else batch + 1
        self.batches += ended
        self.counted += ended
        self.last_batch = batch


class Dispatch:
    """Follows which batch has ended, whichever thread Keras tells it on."""

    def __init__(self) -> None:
        self._thread: int | None = None
        self._has_begun = False
        self._open_batch: int | None = None  # ended or about to end, and not yet attended to; training thread only
        self._step_before: int | None = None
        self._notes: dict[int, Logs] = {}  # of the open batch and later ones; guarded by self._noted
        self._noted = threading.Condition()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()  # a copy of a callback follows another training

    def begin_training(self) -> None:
        """Takes the calling thread as the one that trains."""
        self._has_begun = False
        self.take_thread()
        self._open_batch = None

    def take_thread(self) -> None:
        """Takes the calling thread as the one that trains; no batch that is open is forgotten."""
        self._thread = threading.get_ident()

    def begin_epoch(self) -> None:
        """Forgets the notes of the epoch before."""
        with self._noted:
            self._notes.clear()

    def is_training_thread(self) -> bool:
        """Returns whether the caller's thread is the one that trains."""
        return self._thread is None or threading.get_ident() == self._thread

    def begin_batch(self, last_batch: int, last_step_id: int | None) -> None:
        """Opens the batch that ends as `last_batch`; `last_step_id` will differ once it has."""
        self._has_begun = True
        self._open_batch, self._step_before = last_batch, last_step_id
        with self._noted:
            self._notes = {batch: logs for batch, logs in self._notes.items() if batch >= last_batch}

    def end_batch(self) -> int | None:
        """Returns the batch that has to be attended to, and forgets it."""
        batch, self._open_batch = self._open_batch, None
        return batch

    def has_ended(self, last_step_id: int | None) -> bool:
        """Returns whether there is an open batch that has really ended: Keras also begins one that finds no data."""
        if self._open_batch is None:
            return False
        if last_step_id is not None and last_step_id != self._step_before:
            return True
        with self._noted:  # complete at the end of an epoch only: until then Keras's pool may still be telling
            return self._open_batch in self._notes

    def note(self, batch: int, logs: Logs) -> None:
        """Keeps the logs of a batch; for the threads of Keras's pool, which may overtake each other.

        Raises:
            RuntimeError: no batch was begun, so that nothing would ever be saved.
        """
        if not self._has_begun:
            raise RuntimeError(
                "on_train_batch_end came without on_train_batch_begin. A loop that drives a CallbackList has to call "
                "both: Keras ends batches on another thread, and what is due is saved when the next one begins."
            )
        with self._noted:
            self._notes[batch] = logs
            self._noted.notify_all()

    def wait_for_logs(self, batch: int) -> Logs:
        """Waits for the logs of a batch that is computed.

        Raises:
            RuntimeError: they do not come.
        """
        with self._noted:
            if not self._noted.wait_for(lambda: batch in self._notes, LOGS_TIMEOUT_SECONDS):
                raise RuntimeError(
                    f"The logs of batch {batch} did not come within {LOGS_TIMEOUT_SECONDS:g} s of its end: "
                    "did a callback listed before this one fail or stall in on_train_batch_end?"
                )
            return self._notes[batch]


def plain_numbers(logs: Logs) -> dict[str, float]:
    """Returns the entries of the logs that are numbers, as JSON can hold them; other callbacks put anything there."""
    numbers = {name: _read_number(value) for name, value in logs.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def _read_number(value: Any) -> float | None:  # whatever a callback put into the logs
    try:
        array = np.asarray(value)
    except Exception:  # noqa: BLE001  a ragged list, or a tensor of another library: no number, in its own words
        return None
    return float(array) if array.ndim == 0 and array.dtype.kind in "biuf" else None
