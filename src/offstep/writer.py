"""The trainer's end of the pipe: one writer process per training process.

The writer is started at the first use, and says hello once it runs. If it dies, a new one is started and gets the
unfinished jobs again; their slots are still held here. Where no process can be a writer, a thread does the work.
"""

from __future__ import annotations

import json
import math
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from offstep import worker
from offstep.attachments import Attachment
from offstep.buffers import Slot
from offstep.handover import Handover, Kept, Outcome, Submitted, tell, tell_job, tell_kept, tell_slot
from offstep.ownership import Lock
from offstep.records import Job, Plan
from offstep.signals import held_signals
from offstep.wire import Channel
from offstep.writer_process import WriterProcess, describe_false_start

_MAX_ATTEMPTS = 3
_LOOK_UP_SECONDS = 1.0


@dataclass(frozen=True, eq=False)
class _Receiver:
    """One call of `collect`, and the thread that it runs on."""

    thread: int


class Writer:
    """Hands jobs to the writer process and collects what became of them.

    Any thread may call any method. Jobs are written in the order in which they were submitted.

    Args:
        in_process: Serve in a thread instead of a process of its own.
    """

    def __init__(self, *, in_process: bool = False) -> None:
        self._wants_thread = in_process
        self.in_process = in_process  # also when no process could be started
        self._turn = threading.Condition()
        self._receiver: _Receiver | None = None  # the call of `collect` that takes reports in; guarded by self._turn
        self._lock = threading.RLock()  # guards everything below; held for a few lines only
        self._handed = Handover()
        self._channel: Channel | None = None
        self._process: WriterProcess | None = None
        self._thread: threading.Thread | None = None
        self._next_job = 1
        self._next_plan = 1
        self._run = secrets.token_hex(4)

    @property
    def pid(self) -> int | None:
        """Process id of the running writer process, else `None`."""
        return self._process.pid if self._process else None

    @property
    def run(self) -> str:
        """Names the run in the manifests."""
        return self._run

    def start(self) -> None:
        """Starts the writer, if it is not running; returns before it is ready."""
        with self._lock:
            if self._channel is None:
                self._launch()

    def add_slot(self, slot: Slot) -> None:
        """Makes a slot known to the writer."""
        with self._lock:
            self._handed.slots[slot.number] = slot
            tell_slot(self._channel, slot, with_memory=not self.in_process)

    def drop_slot(self, slot: Slot) -> None:
        """Lets the writer forget a slot that no unfinished job uses."""
        with self._lock:
            del self._handed.slots[slot.number]
            tell(self._channel, {"do": "drop_slot", "slot": slot.number})

    def add_plan(self, plan: Plan, format: str, documents: dict[str, Any] | None) -> int:  # noqa: A002
        """Makes a plan known to the writer and returns its number.

        Args:
            plan: Layout of the slots.
            format: Key of `formats.FORMATS`.
            documents: What that format's `prepare` wants beside the plan, as JSON; e.g. `{"config": str,
                "assets": {path: hex}}` of a Keras model for an Orbax directory.
        """
        text = json.dumps({"plan": plan.to_json(), "format": format, "documents": documents}).encode()
        with self._lock:
            number = self._next_plan
            self._next_plan += 1
            self._handed.plans[number] = text
            if self._channel is not None:
                self._handed.tell_plan(self._channel, number)
        return number

    def drop_plan(self, number: int) -> None:
        """Lets the writer forget a plan that no unfinished job uses."""
        with self._lock:
            del self._handed.plans[number]
            tell(self._channel, {"do": "drop_plan", "plan": number})

    def add_lock(self, lock: Lock) -> int:
        """Shares a lock with the writer, so that it outlives a trainer that is killed; returns its number."""
        with self._lock:
            number = self._next_plan
            self._next_plan += 1
            self._handed.locks[number] = lock
            self._handed.tell_lock(self._channel, number)
        return number

    def drop_lock(self, number: int) -> None:
        """Lets the writer give up its part of a lock that no unfinished job needs."""
        with self._lock:
            del self._handed.locks[number]
            tell(self._channel, {"do": "drop_lock", "lock": number})

    def next_job_number(self) -> int:
        """Returns a new job number."""
        with self._lock:
            number = self._next_job
            self._next_job += 1
            return number

    def job_tag(self, number: int) -> str:
        """Returns a text that only this job has, in all runs."""
        return f"{self._run}-{number}"

    def submit(
        self, job: Job, on_outcome: Callable[[Outcome], None], attachments: Mapping[str, Attachment] | None = None
    ) -> None:
        """Hands a job over; once this returns it is written even if this process is killed.

        Args:
            job: What to write; its slot, if it has one, must not be touched until the outcome.
            on_outcome: Called once, by whichever thread collects the outcome.
            attachments: Files to put into the checkpoint, by name.
        """
        message = {"do": "save", "job": asdict(job)}
        json.dumps(message)  # what cannot be sent must fail here, before anybody waits for it
        with self._lock:
            self.start()
            self._handed.offer(job)
            submitted = self._handed.jobs[job.number] = Submitted(job, message, on_outcome, attachments or {})
            is_told = tell_job(self._channel, submitted)
        if not is_told:
            self.collect()  # the writer has died while it had nothing to do: start another one now

    def keep(self, job: Job, linger_seconds: float, attachments: Mapping[str, Attachment]) -> None:
        """Has the writer keep a snapshot in memory, instead of the one before of the same plan.

        If this process is killed, the writer makes it durable, and waits `linger_seconds` with it for the run that goes
        on. Until `forget` or the next one its slot must not be touched; with the next one it may be at once.
        """
        message = {"do": "keep", "plan": job.plan, "job": asdict(job), "linger_seconds": linger_seconds}
        with self._lock:
            self.start()
            kept = self._handed.kept[job.plan] = Kept(job.number, message, attachments)
            channel = self._channel
            is_told = tell_kept(channel, kept)
        if not is_told and channel is not None:
            self._replace(channel)

    def forget(self, plan: int) -> None:
        """Takes back what was kept of a plan, if anything was."""
        with self._lock:
            if self._handed.kept.pop(plan, None) is not None:
                tell(self._channel, {"do": "forget", "plan": plan})

    def withdraw(self, number: int) -> bool:
        """Takes a job back that the writer has not begun; returns whether it could.

        The writer need not answer, nor even look up from what it is writing: the first to claim the job has it. Its
        outcome is `{"withdrawn": True}`.
        """
        with self._lock:
            submitted = self._handed.claim_back(number)
        if submitted is not None:
            submitted.on_outcome({"withdrawn": True})  # without the lock: it may come back to this writer
        return submitted is not None

    def call_off(self, number: int) -> bool:
        """Takes a job back without an outcome, if it was handed over; returns whether it will never be written."""
        with self._lock:
            return number not in self._handed.jobs or self._handed.claim_back(number) is not None

    def collect(self, timeout_seconds: float = 0.0, until: Callable[[], bool] = lambda: False) -> None:
        """Takes in what the writer has reported, and restarts it if it died with work left.

        Args:
            timeout_seconds: How long to wait for reports; 0 never blocks.
            until: Ends the waiting when true.
        """
        deadline = time.monotonic() + timeout_seconds
        me = _Receiver(threading.get_ident())
        try:
            if self._become_receiver(me, deadline, until):
                self._take_in_all(deadline, until)
        finally:
            with self._turn:
                if self._receiver is me:
                    self._receiver = None
                    self._turn.notify_all()

    def _become_receiver(self, who: _Receiver, deadline: float, until: Callable[[], bool]) -> bool:
        with self._turn:
            while self._receiver is not None:  # another thread takes the reports in, and tells after each
                if self._receiver.thread == who.thread:  # a signal handler, in the middle of that
                    return True
                remaining = deadline - time.monotonic()
                if remaining <= 0 or until():
                    return False
                self._turn.wait(remaining)
            self._receiver = who
        return True

    def _take_in_all(self, deadline: float, until: Callable[[], bool]) -> None:
        while self._handed.jobs and not until():
            # Looks up now and then: what it waits for may have been taken in by a signal handler.
            if self._take_in(min(_LOOK_UP_SECONDS, max(0.0, deadline - time.monotonic()))):
                with self._turn:
                    self._turn.notify_all()
            elif time.monotonic() >= deadline:
                return

    def _take_in(self, timeout_seconds: float) -> bool:
        """Returns whether there was something within the time."""
        self.start()  # only if starting another writer has failed before
        channel = self._channel
        assert channel is not None
        patience = math.inf if self._process is None else self._process.patience_seconds()
        is_there = channel.wait_readable(min(timeout_seconds, patience))
        if not is_there and timeout_seconds < patience:
            return False
        with held_signals():  # Ctrl-C between a report and its note would leave the save pending for ever
            if self._channel is not channel:  # a signal handler has closed or replaced it meanwhile
                return True
            if not is_there or not self._take_message():
                self._restart()
        return True

    def _take_message(self) -> bool:
        """Returns whether the writer has said something, rather than gone."""
        assert self._channel is not None
        try:
            message = self._channel.receive(0.0)
        except EOFError:
            return False
        if message is not None and "hello" in message:
            if self._process is not None:
                self._process.is_greeted = True
        elif message is not None:  # else a part of one
            self._finish(message)
        return True

    def close(self) -> None:
        """Waits for all jobs, then for the writer to end."""
        while self._handed.jobs:
            self.collect(timeout_seconds=60.0)
        with self._lock:
            if self._channel is not None:
                self._channel.close()
                self._channel = None
            self._reap()

    def forget_after_fork(self) -> None:
        """In a forked child: drops the child's copy of the pipe, so that the writer sees the trainer's end close."""
        if self._channel is not None:
            self._channel.socket.close()
        self._channel = None
        self._process = None
        self._thread = None
        self._handed = Handover()
        self._turn = threading.Condition()
        self._receiver = None
        self._lock = threading.RLock()
        self._run = secrets.token_hex(4)

    def _launch(self, reason: str = "") -> None:
        """Starts a writer: a thread if `reason` says why it can be no process."""
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        if not self._wants_thread and not reason:
            try:
                self._process = WriterProcess(theirs)
            except OSError as error:
                reason = str(error)
        self.in_process = self._wants_thread or bool(reason)
        if self.in_process:
            self._start_thread(theirs)
        self._handed.tell_all(self._channel, with_memory=not self.in_process)
        if reason:  # last, because a warning may be an error
            warnings.warn(
                f"offstep cannot start its writer process ({reason}); it writes in a thread, which slows training.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _start_thread(self, theirs: socket.socket) -> None:
        arguments = (Channel(theirs), self._handed.slots)
        # A daemon, because `close` at exit waits for its work before it ends it.
        self._thread = threading.Thread(target=worker.serve, args=arguments, name="offstep-writer", daemon=True)
        self._thread.start()

    def _replace(self, channel: Channel) -> None:
        """Replaces a writer that has died while it had nothing to do, unless somebody has meanwhile."""
        self.collect()  # where there are jobs, that does it
        with self._lock:
            if self._channel is channel:
                self._restart()

    def _restart(self) -> None:
        """Replaces a writer that died, or never lived, and submits the unfinished jobs again."""
        with self._lock:
            assert self._channel is not None
            self._channel.close()
            self._channel = None
            is_no_writer = self._process is not None and not self._process.is_greeted
            status = self._reap()
            if is_no_writer and (status is None or status >= 0):  # by a signal dies also what would have been one
                self._launch(describe_false_start(status))
                return
            # Jobs are served in order: it died on the first.
            first = next(iter(self._handed.jobs.values()), None)
            if first is not None:
                first.attempts += 1
        if first is not None and first.attempts > _MAX_ATTEMPTS:
            text = f"the writer process ended {_MAX_ATTEMPTS} times while it wrote this (exit status {status})"
            self._finish({"job": first.job.number, "error": f"WriterDied: {text}", "errno": None, "died": True})
        with self._lock:
            if (self._handed.jobs or self._handed.kept) and self._channel is None:
                self._launch()

    def _reap(self) -> int | None:
        """Waits for the end of the writer; returns the status of a process that ended by itself."""
        status = None
        if self._process is not None:
            status = self._process.wait()
            self._process = None
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return status

    def _finish(self, outcome: Outcome) -> None:
        with self._lock:
            submitted = self._handed.jobs.pop(outcome["job"])
        submitted.on_outcome(outcome)  # without the lock: it may come back to this writer
