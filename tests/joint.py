"""Starts several training processes on this machine and collects what they say."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 240.0
DEVICES_EACH = 2


def find_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(script: str, count: int, directory: Path, options: Sequence[dict[str, Any]]) -> list[subprocess.Popen[str]]:
    """Starts the processes; each has its own options."""
    port = find_port()
    flags = f"--xla_force_host_platform_device_count={DEVICES_EACH}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax"}
    command = [sys.executable, str(Path(__file__).with_name(script))]
    return [
        subprocess.Popen(
            [*command, str(index), str(count), port, str(directory), json.dumps(options[index])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish(started: Sequence[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """Waits for processes and returns the last line of each, which is JSON."""
    try:
        said = [process.communicate(timeout=PATIENCE_SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(started, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in said]


def run(script: str, count: int, directory: Path, **options: Any) -> list[dict[str, Any]]:
    """Runs processes that all have the same options."""
    return finish(start(script, count, directory, [options] * count))
