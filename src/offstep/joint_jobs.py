"""The jobs that one engine of several processes has in the writer; a thread takes their outcomes in as they come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial

from offstep.attachments import Attachment
from offstep.handover import Outcome
from offstep.joint_save import describe
from offstep.records import NO_SLOT, Job
from offstep.writer import Writer

_FOREVER_SECONDS = 3600.0


class JointJobs:
    """Hands jobs over and passes on what became of them: the training thread may be far from its next hook.

    Args:
        writer: This process's.
        changed: Is notified after each outcome; guards what is in here too.
    """

    def __init__(self, writer: Writer, changed: threading.Condition) -> None:
        self._writer, self._changed = writer, changed
        self._jobs: dict[int, tuple[Job, Callable[[Outcome], None]]] = {}  # by number
        self._is_closed = False
        # A daemon, because `close` at exit waits for its work before it ends it.
        self._thread = threading.Thread(target=self._collect_all, name="offstep-collect", daemon=True)
        self._thread.start()

    def hand_over(
        self, job: Job, on_outcome: Callable[[Outcome], None], attachments: Mapping[str, Attachment] | None = None
    ) -> None:
        """Has the writer do a job; `on_outcome` is called once, on whichever thread collects."""
        with self._changed:
            self._jobs[job.number] = job, on_outcome
            try:
                self._writer.submit(job, partial(self._note, job.number), attachments or {})
            except Exception as error:  # noqa: BLE001  it fails like a save that the writer could not write
                self._note(job.number, describe(error))
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the thread, once all jobs are done."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _note(self, number: int, outcome: Outcome) -> None:
        with self._changed:
            _, on_outcome = self._jobs.pop(number, (None, None))
        if on_outcome is not None:  # else it has been given up
            on_outcome(outcome)
            with self._changed:
                self._changed.notify_all()

    def _collect_all(self) -> None:
        while self._wait_for_jobs():
            try:
                self._writer.collect(_FOREVER_SECONDS, until=lambda: not self._jobs)
            except Exception as error:  # noqa: BLE001  no writer can be started, for one
                self._give_up(describe(error))
                if self._is_closed:
                    return

    def _wait_for_jobs(self) -> bool:
        """Returns false once it is closed and all jobs are done: the outcome of one may have led to another."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or bool(self._jobs))
            return bool(self._jobs)

    def _give_up(self, outcome: Outcome) -> None:
        for number, (job, _) in list(self._jobs.items()):
            # A job without a slot cannot be called off: it may still be done.
            if job.slot == NO_SLOT or self._writer.call_off(number):
                self._note(number, outcome | {"is_unsure": job.slot == NO_SLOT})
