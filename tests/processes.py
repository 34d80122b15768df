"""Writer processes found from outside, and processes waited for without polling their work."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

PATIENCE_SECONDS = 60.0


def find_writers(trainer: int | None = None) -> list[psutil.Process]:
    """Returns the running writer processes of a trainer, by default of this process."""
    writers = []
    for child in psutil.Process(trainer).children():
        with suppress(psutil.NoSuchProcess):
            if any("offstep.worker" in text for text in child.cmdline()):
                writers.append(child)
    return writers


def open_files(pid: int) -> list[str]:
    """Returns what the descriptors of a process refer to, e.g. `"/memfd:offstep-slot-1 (deleted)"`."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor that lists them
            links.append(os.readlink(entry))
    return links


def count_slots() -> int:
    """Returns how many slots this process holds."""
    return len({link for link in open_files(os.getpid()) if link.startswith("/memfd:offstep-slot")})


def wait_until(is_so: Callable[[], bool]) -> None:
    """Waits, busily, for what sends no event."""
    import time

    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be"


def wait_for_end(pid: int) -> None:
    """Waits until a process that need not be a child of this one has ended."""
    assert has_ended(pid, PATIENCE_SECONDS), f"process {pid} does not end"


def has_ended(pid: int, timeout_seconds: float) -> bool:
    """Waits so long for the end of a process; a child of this one that has ended is still to be waited for."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(max(0.0, timeout_seconds) * 1000))
    finally:
        os.close(descriptor)
