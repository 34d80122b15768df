"""The trainer's end of the pipe: one writer process per training process.

The writer is started at the first use. If it dies, a new one is started and gets the unfinished jobs again; their
slots are still held here.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from offstep import worker
from offstep.buffers import Slot
from offstep.records import Job, Plan
from offstep.wire import Channel, Message

Outcome = Message
"""What the writer says of a job: `durable_at`, or `error` and `errno`."""

_MAX_ATTEMPTS = 3
_START = "import sys; sys.path[:] = {path!r}; from offstep.worker import main; main()"


@dataclass
class _Submitted:
    job: Job
    message: Message
    on_outcome: Callable[[Outcome], None]
    attempts: int = 1


@dataclass
class _Handed:
    """Everything a new writer needs to be told, in this order."""

    slots: dict[int, Slot] = field(default_factory=dict)
    plans: dict[int, bytes] = field(default_factory=dict)
    jobs: dict[int, _Submitted] = field(default_factory=dict)


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
        self._is_receiving = False  # whether a thread waits for reports; guarded by self._turn
        self._lock = threading.RLock()  # guards everything below; held for a few lines only
        self._handed = _Handed()
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._next_job = 1
        self._next_plan = 1
        self._run = secrets.token_hex(4)

    @property
    def pid(self) -> int | None:
        """Process id of the running writer process, else `None`."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the writer, if it is not running; returns before it is ready."""
        with self._lock:
            if self._channel is None:
                self._launch()

    def add_slot(self, slot: Slot) -> None:
        """Makes a slot known to the writer."""
        with self._lock:
            self._handed.slots[slot.number] = slot
            self._tell_slot(slot)

    def drop_slot(self, slot: Slot) -> None:
        """Lets the writer forget a slot that no unfinished job uses."""
        with self._lock:
            del self._handed.slots[slot.number]
            self._tell({"do": "drop_slot", "slot": slot.number})

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
                self._tell_plan(number)
        return number

    def drop_plan(self, number: int) -> None:
        """Lets the writer forget a plan that no unfinished job uses."""
        with self._lock:
            del self._handed.plans[number]
            self._tell({"do": "drop_plan", "plan": number})

    def next_job_number(self) -> int:
        """Returns a new job number."""
        with self._lock:
            number = self._next_job
            self._next_job += 1
            return number

    def job_tag(self, number: int) -> str:
        """Returns a text that only this job has, in all runs."""
        return f"{self._run}-{number}"

    def submit(self, job: Job, on_outcome: Callable[[Outcome], None]) -> None:
        """Hands a job over; once this returns it is written even if this process is killed.

        Args:
            job: What to write; its slot must not be touched until the outcome.
            on_outcome: Called once, by whichever thread collects the outcome.
        """
        message = {"do": "save", "job": asdict(job)}
        json.dumps(message)  # what cannot be sent must fail here, before anybody waits for it
        with self._lock:
            self.start()
            self._handed.jobs[job.number] = _Submitted(job, message, on_outcome)
            is_told = self._tell(message)
        if not is_told:
            self.collect()  # the writer has died while it had nothing to do: start another one now

    def collect(self, timeout_seconds: float = 0.0, until: Callable[[], bool] = lambda: False) -> None:
        """Takes in what the writer has reported, and restarts it if it died with work left.

        Args:
            timeout_seconds: How long to wait for reports; 0 never blocks.
            until: Ends the waiting when true.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._turn:
            while self._is_receiving:  # another thread takes the reports in, and tells after each
                remaining = deadline - time.monotonic()
                if remaining <= 0 or until():
                    return
                self._turn.wait(remaining)
            self._is_receiving = True
        try:
            while self._handed.jobs and not until() and self._take_in(max(0.0, deadline - time.monotonic())):
                with self._turn:
                    self._turn.notify_all()
        finally:
            with self._turn:
                self._is_receiving = False
                self._turn.notify_all()

    def _take_in(self, timeout_seconds: float) -> bool:
        """Returns whether there was something within the time."""
        self.start()  # only if starting another writer has failed before
        assert self._channel is not None
        try:
            message = self._channel.receive(timeout_seconds)
        except EOFError:
            self._restart()
            return True
        if message is None:
            return False
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
        self._handed = _Handed()
        self._turn = threading.Condition()
        self._is_receiving = False
        self._lock = threading.RLock()
        self._run = secrets.token_hex(4)

    def _tell(self, message: Message, descriptor: int | None = None) -> bool:
        """Sends to a running writer; one that has died is replaced at the next `collect`, and told everything."""
        if self._channel is None:
            return False
        try:
            self._channel.send(message, descriptor)
        except OSError:
            return False
        return True

    def _tell_slot(self, slot: Slot) -> None:
        descriptor = None if self.in_process else slot.fd
        self._tell({"do": "add_slot", "slot": slot.number, "bytes": slot.size_bytes}, descriptor)

    def _tell_plan(self, number: int) -> None:
        # A plan can be larger than the pipe's buffer; through a memfd sending it never blocks.
        descriptor = _spool(self._handed.plans[number])
        try:
            self._tell({"do": "add_plan", "plan": number}, descriptor)
        finally:
            os.close(descriptor)

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        self.in_process = self._wants_thread
        if not self.in_process:
            self._start_process(theirs)
        if self.in_process:
            self._start_thread(theirs)
        for slot in self._handed.slots.values():
            self._tell_slot(slot)
        for number in self._handed.plans:
            self._tell_plan(number)
        for submitted in self._handed.jobs.values():
            self._tell(submitted.message)

    def _start_process(self, theirs: socket.socket) -> None:
        code = _START.format(path=sys.path)
        try:
            if not sys.executable:
                raise OSError("the path of the Python interpreter is not known")
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # so that Ctrl-C does not reach it
            )
            theirs.close()
        except OSError as error:
            self.in_process = True
            warnings.warn(
                f"offstep cannot start its writer process ({error}); it writes in a thread, which slows training.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _start_thread(self, theirs: socket.socket) -> None:
        arguments = (Channel(theirs), self._handed.slots)
        # A daemon, because `close` at exit waits for its work before it ends it.
        self._thread = threading.Thread(target=worker.serve, args=arguments, name="offstep-writer", daemon=True)
        self._thread.start()

    def _restart(self) -> None:
        """Replaces a writer that died, and submits the unfinished jobs again."""
        with self._lock:
            assert self._channel is not None
            self._channel.close()
            self._channel = None
            status = self._reap()
            # Jobs are served in order: it died on the first.
            first = next(iter(self._handed.jobs.values()))
            first.attempts += 1
        if first.attempts > _MAX_ATTEMPTS:
            text = f"WriterDied: the writer process ended {_MAX_ATTEMPTS} times while it wrote this ({status})"
            self._finish({"job": first.job.number, "error": text, "errno": None, "died": True})
        with self._lock:
            if self._handed.jobs and self._channel is None:
                self._launch()

    def _reap(self) -> str:
        status = "no process"
        if self._process is not None:
            status = f"exit status {self._process.wait()}"
            self._process = None
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return status

    def _finish(self, outcome: Outcome) -> None:
        with self._lock:
            submitted = self._handed.jobs.pop(outcome["job"])
        submitted.on_outcome(outcome)  # without the lock: it may come back to this writer


def _spool(text: bytes) -> int:
    """Returns a descriptor of an anonymous file that holds `text`."""
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryFile() as file:
            file.write(text)
            file.flush()
            return os.dup(file.fileno())
    descriptor = os.memfd_create("offstep-plan", os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(text)
    return descriptor


_shared = {in_process: Writer(in_process=in_process) for in_process in (False, True)}
_users = {False: 0, True: 0}  # guarded by _users_lock
_users_lock = threading.RLock()


def borrow_shared(*, in_process: bool = False) -> Writer:
    """Returns this process's writer, started; give it back with `return_shared`."""
    with _users_lock:
        _users[in_process] += 1
        _shared[in_process].start()
    return _shared[in_process]


def return_shared(*, in_process: bool = False) -> None:
    """Ends the writer once its last user has given it back and its work is done."""
    with _users_lock:
        _users[in_process] -= 1
        if _users[in_process] == 0:
            _shared[in_process].close()


def _forget_after_fork() -> None:
    global _users_lock  # noqa: PLW0603  the parent's may be held by a thread that this process does not have
    _users_lock = threading.RLock()
    for in_process, shared in _shared.items():
        shared.forget_after_fork()
        _users[in_process] = 0


os.register_at_fork(after_in_child=_forget_after_fork)
