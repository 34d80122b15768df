"""Starts several training processes on this machine and collects what they say."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from interpreters import Interpreter
from processes import find_writers

PATIENCE_SECONDS = 240.0
DEVICES_EACH = 2


def find_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


class Trainer:
    """One training process; it lives until its stdin is closed, or by itself.

    Attributes:
        report: The JSON that it printed; empty if it has ended before.
        status: Its exit status, once it has ended.
    """

    def __init__(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by `end`
        self._process = Interpreter(
            arguments, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        self.report: dict[str, Any] = {}
        self.status: int | None = None
        self.errors = ""

    def read(self) -> None:
        """Waits for the report, or for the end of the process."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self.report = json.loads(line)
                return

    def read_lines(self, start: str, count: int) -> None:
        """Waits until it has printed so many lines that begin so, or for its end."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            count -= line.startswith(start)
            if not count:
                return

    def find_writers(self) -> list[psutil.Process]:
        """Returns its writer process, if it runs."""
        return find_writers(self._process.pid)

    def terminate(self) -> None:
        """Tells it to end."""
        self._process.terminate()

    def go_on(self) -> None:
        """Continues it if it has been stopped."""
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Closes its stdin and waits for its end."""
        self._process.communicate(timeout=PATIENCE_SECONDS)
        self.status = self._process.returncode
        self._errors.seek(0)
        self.errors = self._errors.read()[-3000:]

    def kill(self) -> None:
        """Ends it whatever it does."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def start(script: str, count: int, directory: Path, options: Sequence[dict[str, Any]]) -> list[Trainer]:
    """Starts the processes; each has its own options."""
    port = find_port()
    flags = f"--xla_force_host_platform_device_count={DEVICES_EACH}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax"}
    path = str(Path(__file__).with_name(script))
    return [
        Trainer([path, str(index), str(count), port, str(directory), json.dumps(options[index])], environment)
        for index in range(count)
    ]


def run(script: str, count: int, directory: Path, **options: Any) -> list[dict[str, Any]]:
    """Runs processes that all have the same options, and returns what each has reported."""
    trainers = start(script, count, directory, [options] * count)
    try:
        for trainer in trainers:
            trainer.read()
        for trainer in trainers:
            trainer.end()
    finally:
        for trainer in trainers:
            trainer.kill()
    for trainer in trainers:
        assert trainer.status == 0, trainer.errors
    return [trainer.report for trainer in trainers]
