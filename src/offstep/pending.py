"""One save on its way to the disk, as its owner sees it."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any, Protocol

from offstep.errors import SaveFailed
from offstep.records import SaveStats


class Waiter(Protocol):
    """Who can wait for a save: the engine that took it."""

    def wait_for(self, pending: PendingSave, timeout: float | None) -> None:
        """Waits until the save is durable or has failed, and raises what `PendingSave.wait` raises."""


class PendingSave:
    """One save on its way to the disk. Any thread may ask.

    Attributes:
        note: Whatever the caller of `Engine.save` wanted to remember.
        error: Why it failed, once it has.
    """

    def __init__(self, stats: SaveStats, note: str, waiter: Waiter) -> None:
        self.note = note
        self.error: SaveFailed | None = None
        self._waiter = waiter
        self._stats = stats  # replaced under self._lock
        self._lock = threading.Lock()
        self._submitted = threading.Event()
        self._done = threading.Event()

    def __repr__(self) -> str:
        done = "replaced" if self.stats.skipped else "failed" if self.error else "durable"
        state = done if self.done() else "pending"
        return f"PendingSave(step={self.step}, path={self.path!r}, {state})"

    @property
    def step(self) -> int:
        """Training step of the snapshot."""
        return self._stats.step

    @property
    def path(self) -> str:
        """Where it will be found."""
        return self._stats.path

    @property
    def stats(self) -> SaveStats:
        """What it has cost so far."""
        return self._stats

    def done(self) -> bool:
        """Returns whether it is durable or has failed, as far as reports have been taken in."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> None:
        """Waits until the checkpoint is durable.

        Raises:
            SaveFailed: it could not be made durable; `SaveReplaced` when a newer one took its place.
            SaveTimeout: `timeout` seconds ran out; the save goes on.
        """
        self._waiter.wait_for(self, timeout)

    # What follows is for the engine.

    def change(self, **changes: Any) -> None:  # fields of SaveStats
        """Replaces fields of the stats."""
        with self._lock:
            self._stats = replace(self._stats, **changes)

    def mark_submitted(self) -> None:
        """Tells those who wait that the writer has it, or never will."""
        self._submitted.set()

    def wait_until_submitted(self, timeout: float | None) -> bool:
        """Waits for `mark_submitted`; returns whether it came within `timeout` seconds."""
        # Not `wait` at once: a signal handler that raises in it may leave the event's lock held for ever.
        return self._submitted.is_set() or self._submitted.wait(timeout)

    def disown(self) -> None:
        """In a forked child: ends the waiting for what is the parent's, which alone hears of it."""
        self._lock = threading.Lock()  # other threads of the parent may have had these
        self._submitted, self._done = threading.Event(), threading.Event()
        text = f"step {self.step} ({self.path}) belongs to the parent process; only there can it be waited for"
        self.settle(SaveFailed(text))

    def settle(self, error: SaveFailed | None) -> None:
        """Ends the waiting: it is durable, or has failed with `error`."""
        self.error = error
        self._submitted.set()
        self._done.set()
