"""The parent of all processes: starts trainees, hears what they claim, ends them, and asks the verifier."""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import psutil
from model import Shape
from oracle import Claims, Found, judge
from peers import Peer
from processes import has_ended
from verdict import Ended, Hung, Verdict

HERE = Path(__file__).parent
DEADLINE_SECONDS = 90.0
_START_SECONDS = 120.0
_PR_SET_CHILD_SUBREAPER = 36


class Bench:
    """Where trials take place. Use it as a context manager.

    Args:
        directory: Where checkpoints go.
        sabotage: What our writers leave out, by name in `writer_entry`, to show that the scorecard can fail.
        wrapper: A command that runs every trainee of ours, to the same end.
    """

    def __init__(self, directory: Path, *, sabotage: Sequence[str] = (), wrapper: Sequence[str] = ()) -> None:
        self.root = directory / f"scorecard-{os.getpid()}"
        self._sabotage, self._wrapper = list(sabotage), tuple(wrapper)
        self.random = Random(0)
        self._count = 0
        self._processes: list[Process] = []  # of the trial
        self._verifiers: dict[str, Verifier] = {}
        self._servants: set[int] = set()

    def __enter__(self) -> Bench:
        self.root.mkdir(parents=True)
        # Whoever loses its parent becomes a child of this process, so that nothing gets lost.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, str(HERE / "nursery.py"), str(theirs.fileno())]
        self._nursery = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment())
        theirs.close()
        self._socket.settimeout(_START_SECONDS)
        assert self._socket.recv(16) == b"ready", "the nursery has not come up"
        return self

    def __exit__(self, *_: object) -> None:
        self.rest()
        self._socket.close()
        self._nursery.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """Yields an empty directory for one trial; afterwards no process of the trial lives and it is deleted."""
        self._count += 1
        path = self.root / str(self._count)
        path.mkdir()
        try:
            yield path
        finally:
            self.end_all()
            for process in self._processes:
                process.close()
            self._processes.clear()
            shutil.rmtree(path, ignore_errors=True)

    def start(
        self, peer: Peer, directory: Path, *, shape: Shape | None = None, wrapper: Sequence[str] = (), **spec: Any
    ) -> Trainee:
        """Starts a trainee; `spec` is the rest of `trainee.Spec`.

        Args:
            peer: Who saves.
            directory: Where to.
            shape: Of the model.
            wrapper: A command that runs it, such as a tracer's. It takes some seconds longer then.
            spec: More fields of `trainee.Spec`.
        """
        shape = shape or Shape()
        spec = {"keep": peer.keep, "file": peer.file} | spec
        spec |= {"peer": peer.name, "directory": str(directory), "shape": asdict(shape)}
        if peer.is_ours and self._sabotage:
            spec["writer"] = (spec.get("writer") or {}) | {"sabotage": self._sabotage}
        process = self.bear("trainee", spec, wrapper=wrapper or (self._wrapper if peer.is_ours else ()))
        self._processes.append(process)
        return Trainee(process, replace(peer, keep=spec["keep"]), shape, directory)

    def bear(self, module: str, arguments: dict[str, Any], *, wrapper: Sequence[str] = ()) -> Process:
        """Starts `main(arguments)` of a module of the scorecard in a process of its own."""
        order = json.dumps({"module": module, "arguments": arguments})
        self._count += 1
        log = self.root / f"{self._count}.log"
        in_theirs, in_ours = os.pipe()
        out_ours, out_theirs = os.pipe()
        with log.open("wb") as errors:
            theirs = [in_theirs, out_theirs, errors.fileno()]
            if wrapper:
                command = [*wrapper, sys.executable, str(HERE / "nursery.py"), "--once", order]
                streams = dict(zip(("stdin", "stdout", "stderr"), theirs, strict=True))
                launcher = subprocess.Popen(command, start_new_session=True, env=environment(), **streams)
            else:
                launcher = None
                socket.send_fds(self._socket, [order.encode()], theirs)
        os.close(in_theirs)
        os.close(out_theirs)
        return Process(in_ours, out_ours, log, launcher)

    def find(
        self, peer: Peer, directory: Path, shape: Shape | None = None, *, only_newest: bool = False
    ) -> list[Found]:
        """Has stock readers read what is there, in a process that knows no offstep."""
        if peer.name not in self._verifiers:
            self._verifiers[peer.name] = Verifier(self.bear("verifier", {}))
        return self._verifiers[peer.name].look(peer, directory, shape or Shape(), only_newest=only_newest)

    def forget_verifier(self, peer: Peer) -> None:
        """Ends the verifier of a peer, if it still lives; the next question goes to a fresh one."""
        verifier = self._verifiers.pop(peer.name)
        kill(verifier.pid)
        verifier.close()

    @contextmanager
    def served_by(self, pid: int) -> Iterator[None]:
        """In the block this process serves the trials, as a file system does, and belongs to none of them."""
        self._servants.add(pid)
        try:
            yield
        finally:
            self._servants.discard(pid)

    def rest(self, seed: str = "") -> None:
        """Lets the verifiers go, so that the next ones are fresh, and begins another random sequence."""
        self.random.seed(seed)
        for verifier in self._verifiers.values():
            verifier.close()
        self._verifiers.clear()
        self.end_all()

    def family(self) -> list[psutil.Process]:
        """Returns all processes that trials have left, the running ones too."""
        known = {self._nursery.pid, *self._servants, *(verifier.pid for verifier in self._verifiers.values())}
        return [each for each in psutil.Process().children(recursive=True) if each.pid not in known]

    def settle(self, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        """Waits until the processes of the trial have ended by themselves.

        Raises:
            Hung: they have not in time, and have been killed.
        """
        deadline = time.monotonic() + deadline_seconds
        while left := self.family():
            if time.monotonic() > deadline:
                self.end_all()
                raise Hung(f"still there: {left}")
            _await_and_reap(left[0].pid, deadline - time.monotonic())

    def end_all(self) -> None:
        """Kills what is left of a trial."""
        while left := self.family():
            for process in left:
                with suppress(psutil.NoSuchProcess, ProcessLookupError):
                    process.resume()
                    process.kill()
            _await_and_reap(left[0].pid, 10)

    def judge(self, trainee: Trainee, **options: Any) -> Verdict:
        """Judges a trainee that has ended by what can be restored; `options` are those of `oracle.judge`."""
        found = self.find(trainee.peer, trainee.directory, trainee.shape)
        options = {"errors": trainee.errors} | options
        return judge(trainee.shape, trainee.peer.keep, trainee.claims, found, **options)


def kill(*pids: int) -> None:
    """Kills processes by SIGKILL; one that has ended already is no error."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def environment() -> dict[str, str]:
    """Returns the environment of all processes: JAX on the CPU, and none of its noise."""
    return os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


def _await_and_reap(pid: int, timeout_seconds: float) -> None:
    if has_ended(pid, timeout_seconds):
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


class Process:
    """A process of the bench: its lines, its end, and what it wrote to stderr."""

    def __init__(self, to: int, out: int, log: Path, launcher: subprocess.Popen[bytes] | None) -> None:
        self.stdin, self._out, self._log, self._launcher = to, out, log, launcher
        self._buffer = b""
        self._status: int | None = None
        self.pid = int(self.read_line(_START_SECONDS).split()[1])

    def read_line(self, timeout_seconds: float = DEADLINE_SECONDS) -> str:
        """Returns the next line.

        Raises:
            Hung: none came.
            Ended: none will come.
        """
        deadline = time.monotonic() + timeout_seconds
        while b"\n" not in self._buffer:
            if not select.select([self._out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise Hung("no word")
            part = os.read(self._out, 1 << 16)
            if not part:
                raise Ended(self.errors)
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    @property
    def errors(self) -> str:
        """What it, and its writer, wrote to stderr."""
        return self._log.read_text(errors="replace")

    def write(self, text: str) -> None:
        os.write(self.stdin, text.encode())

    def wait(self, timeout_seconds: float = DEADLINE_SECONDS) -> int:
        """Waits for its end and returns its status as `subprocess` does.

        Raises:
            Hung: it does not end.
        """
        if self._status is not None:
            return self._status
        pid = self.pid if self._launcher is None else self._launcher.pid
        if not has_ended(pid, timeout_seconds):
            raise Hung("it does not end")
        self._status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if self._launcher is not None:
            self._launcher.returncode = self._status
        return self._status

    def close(self) -> None:
        """Lets go of its pipes, by which a server of ours ends, and of what it wrote to stderr."""
        os.close(self.stdin)
        os.close(self._out)
        self._log.unlink()


class Trainee:
    """A process that trains and saves, and what it has claimed so far."""

    def __init__(self, process: Process, peer: Peer, shape: Shape, directory: Path) -> None:
        self.process, self.peer, self.shape, self.directory = process, peer, shape, directory
        self.claims = Claims()
        self.notes: list[str] = []  # lines that are no claims

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def errors(self) -> str:
        return self.process.errors

    def hear(self, timeout_seconds: float = DEADLINE_SECONDS) -> str:
        """Takes in the next line and returns its first word."""
        line = self.process.read_line(timeout_seconds)
        word, _, rest = line.partition(" ")
        match word:
            case "submitted":
                self.claims.submitted.append(int(rest))
            case "durable":
                self.claims.durable.append(int(rest))
            case "done":
                self.claims.is_done = True
            case _:
                self.notes.append(line)
        return word

    def hear_until(self, word: str, count: int = 1, timeout_seconds: float = DEADLINE_SECONDS) -> None:
        """Takes lines in until `count` more of them begin with `word`."""
        deadline = time.monotonic() + timeout_seconds
        while count:
            count -= self.hear(max(0.0, deadline - time.monotonic())) == word

    def hear_out(self, timeout_seconds: float = DEADLINE_SECONDS) -> int:
        """Takes in everything until it has ended, and returns its status."""
        deadline = time.monotonic() + timeout_seconds
        with suppress(Ended):
            while True:
                self.hear(max(0.0, deadline - time.monotonic()))
        return self.process.wait(max(0.0, deadline - time.monotonic()))

    def drain(self) -> None:
        """Takes in what it has said so far, so that its pipe does not fill."""
        with suppress(Hung, Ended):
            while True:
                self.hear(0)

    def writers(self) -> list[int]:
        """Returns the processes that it has started."""
        try:
            return [each.pid for each in psutil.Process(self.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self, *, with_writers: bool = False) -> None:
        """Kills it by SIGKILL, and its writers at the same moment if asked."""
        kill(*(self.writers() if with_writers else ()), self.pid)


class Verifier:
    """A process that reads checkpoints back with stock Keras and Orbax."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.pid = process.pid

    def look(self, peer: Peer, directory: Path, shape: Shape, *, only_newest: bool = False) -> list[Found]:
        question = {
            "reader": peer.reader,
            "directory": str(directory),
            "file": peer.file,
            "suffix": peer.suffix,
            "shape": asdict(shape),
            "only_newest": only_newest,
        }
        self._process.write(json.dumps(question) + "\n")
        return [Found(**each) for each in json.loads(self._process.read_line())]

    def close(self) -> None:
        self._process.close()
        with suppress(Hung):
            self._process.wait(10)
