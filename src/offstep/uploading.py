"""Copies durable steps into stores while later ones are written: one at a time, for each store the newest."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

from offstep.inbox import Attached
from offstep.records import Job
from offstep.wire import Message

_NICENESS = 15  # of the thread, beside 5 of the writer process


class Uploader:
    """The copies of one writer. Its thread starts with the first of them.

    Args:
        upload: Makes one copy, or its part of one, with what is attached to that, and returns what the trainer is told.
        tell: Tells the trainer; from the thread of the copies too.
    """

    def __init__(self, upload: Callable[[Job, Attached], Message], tell: Callable[[Message], None]) -> None:
        self._upload, self._tell = upload, tell
        self._changed = threading.Condition()
        self._current: Job | None = None  # guarded by self._changed, as all that follows
        self._waiting: list[tuple[Job, Attached]] = []
        self._has_ended = False
        self._thread: threading.Thread | None = None

    @property
    def sources(self) -> frozenset[str]:
        """The directories that are being copied, or wait for it: they must stay."""
        with self._changed:
            jobs = [job for job, _ in self._waiting]
            return frozenset(job.source for job in (self._current, *jobs) if job is not None)

    def add(self, job: Job, attached: Attached) -> None:
        """Has a step copied; another one that waits to be copied to the same place is not, and the trainer is told so.

        What several processes copy together they have chosen before.
        """
        with self._changed:
            replaced = self._take_replaced(job) if job.format == "upload" else None
            self._waiting.append((job, attached))
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
        while (entry := self._take()) is not None:
            answer = self._upload(*entry)
            with self._changed:
                self._current = None
            self._tell(answer)

    def _take(self) -> tuple[Job, Attached] | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or self._has_ended)
            job, attached = self._waiting.pop(0) if self._waiting else (None, {})
            self._current = job
            return None if job is None else (job, attached)

    def _take_replaced(self, job: Job) -> Job | None:
        for entry in self._waiting:
            if (entry[0].format, entry[0].root) == (job.format, job.root):
                self._waiting.remove(entry)
                return entry[0]
        return None
