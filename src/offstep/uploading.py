"""Copies durable steps into a store while later ones are written: one at a time, the newest of those that wait."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

from offstep.records import Job
from offstep.wire import Message

_NICENESS = 15  # of the thread, beside 5 of the writer process


class Uploader:
    """The copies of one writer. Its thread starts with the first of them.

    Args:
        upload: Makes one copy and returns what the trainer is told of it.
        tell: Tells the trainer; from the thread of the copies too.
    """

    def __init__(self, upload: Callable[[Job], Message], tell: Callable[[Message], None]) -> None:
        self._upload, self._tell = upload, tell
        self._changed = threading.Condition()
        self._current: Job | None = None  # guarded by self._changed, as all that follows
        self._waiting: Job | None = None
        self._has_ended = False
        self._thread: threading.Thread | None = None

    @property
    def sources(self) -> frozenset[str]:
        """The directories that are being copied, or wait for it: they must stay."""
        with self._changed:
            return frozenset(job.source for job in (self._current, self._waiting) if job is not None)

    def add(self, job: Job) -> None:
        """Has a step copied; another one that waits is not, and the trainer is told so."""
        with self._changed:
            replaced, self._waiting = self._waiting, job
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="offstep-upload", daemon=True)
                self._thread.start()
            self._changed.notify()
        if replaced is not None:
            self._tell({"job": replaced.number, "withdrawn": True})

    def finish(self) -> None:
        """Waits until all copies are made."""
        with self._changed:
            self._has_ended = True
            self._changed.notify()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # not everywhere a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while (job := self._take()) is not None:
            answer = self._upload(job)
            with self._changed:
                self._current = None
            self._tell(answer)

    def _take(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._has_ended)
            self._current, self._waiting = self._waiting, None
            return self._current
