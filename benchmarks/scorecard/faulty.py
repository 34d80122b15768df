"""The parent's side of `faulty_mount`: a directory below which calls fail as told."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import Bench

HERE = Path(__file__).parent
_PATIENCE_SECONDS = 20.0


def why_not_here() -> str | None:
    """Returns why nothing can be mounted with FUSE here."""
    if os.geteuid() != 0:
        return "needs root"
    if not Path("/dev/fuse").exists():
        return "no /dev/fuse"
    if importlib.util.find_spec("mfusepy") is None:
        return "mfusepy is not installed"
    try:
        import mfusepy  # noqa: F401  it loads the library
    except OSError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Told:
    """What has happened since the last order.

    Attributes:
        counts: Calls by kind: write, fsync, rename, create, delete, chmod.
        failed: How many were made to fail.
    """

    counts: dict[str, int]
    failed: int


class FaultyDisk:
    """A mounted directory.

    Attributes:
        path: Where it is mounted.
        below: The directory below, which never fails.
    """

    def __init__(self, path: Path, below: Path, server: subprocess.Popen[str]) -> None:
        self.path, self.below, self._server = path, below, server

    def order(self, **orders: Any) -> Told:
        """Gives new orders, those of `faulty_mount`, and returns what happened under the ones before."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(orders) + "\n")
        self._server.stdin.flush()
        return Told(**json.loads(self._server.stdout.readline()))


@contextmanager
def faulty_mount(bench: Bench, workplace: Path) -> Iterator[FaultyDisk]:
    """A mount in `workplace` while the block lasts."""
    path, below = workplace / "faulty", workplace / "below"
    path.mkdir()
    below.mkdir()
    command = [sys.executable, str(HERE / "faulty_mount.py"), str(below), str(path)]
    with (workplace / "faulty.log").open("wb") as log:
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    with bench.served_by(server.pid):
        try:
            _wait_until_mounted(path, server)
            yield FaultyDisk(path, below, server)
        finally:
            bench.end_all()
            _end(server, path)


def _wait_until_mounted(path: Path, server: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not os.path.ismount(path):
        if server.poll() is not None or time.monotonic() > deadline:
            raise OSError(f"{path} could not be mounted")
        time.sleep(0.02)


def _end(server: subprocess.Popen[str], path: Path) -> None:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.close()  # by which it unmounts
    try:
        server.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    server.stdout.close()
    if os.path.ismount(path):
        subprocess.run(["umount", "--lazy", path], check=False)
