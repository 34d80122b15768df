"""How an engine works: the options that every face of it takes, checked once, at construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

OnBusy = Literal["wait", "skip", "latest"]
OnError = Literal["raise", "warn"]
Mode = Literal["host", "device_copy", "transfer"]
Layout = Literal["shared", "local"]

_MOST_COPY_THREADS = 256  # that the native module takes


@dataclass(frozen=True)
class Options:
    """How an engine works; see `Checkpointer` for the meaning of each."""

    slots: int = 2
    on_busy: OnBusy = "wait"
    on_error: OnError = "raise"
    memory_budget: int | None = None
    copy_threads: int = 2
    snapshot_mode: Mode | None = None
    in_process: bool = False
    full_every: int | None = None
    retry_seconds: float = 30.0
    exit_seconds: float = 300.0
    private: bool = False
    commit_seconds: float = 300.0
    layout: Layout = "shared"
    memory_every: int | None = None
    memory_linger_seconds: float = 600.0
    copies_into_store: bool = False  # steps of directories of this machine, or of disks of the processes' own

    def __post_init__(self) -> None:
        """Checks each option.

        Raises:
            ValueError: one is out of range; the message ends in what was received.
        """
        _check(isinstance(self.slots, int) and self.slots >= 1, "slots must be an integer of at least 1", self.slots)
        ways = ("wait", "skip", "latest")
        _check(self.on_busy in ways, "on_busy must be 'wait', 'skip' or 'latest'", self.on_busy)
        has_room = self.on_busy != "latest" or self.slots >= 2
        _check(has_room, "on_busy='latest' needs 2 slots or more: one is written while another waits", self.slots)
        _check(self.on_error in ("raise", "warn"), "on_error must be 'raise' or 'warn'", self.on_error)
        budget = self.memory_budget
        is_budget = budget is None or (isinstance(budget, (int, float)) and budget > 0)
        _check(is_budget, "memory_budget must be a positive number of bytes", budget)
        threads = self.copy_threads
        is_count = isinstance(threads, int) and 1 <= threads <= _MOST_COPY_THREADS
        _check(is_count, f"copy_threads must be an integer from 1 to {_MOST_COPY_THREADS}", threads)
        every = self.full_every
        is_every = every is None or (isinstance(every, int) and every >= 1)
        _check(is_every, "full_every must be None or an integer of at least 1", every)
        every = self.memory_every
        is_every = every is None or (isinstance(every, int) and every >= 1)
        _check(is_every, "memory_every must be None or an integer of at least 1", every)
        can_keep = every is None or not self.in_process
        _check(
            can_keep, "memory_every needs a writer in a process of its own, which outlives this one", "in_process=True"
        )
        for name in ("retry_seconds", "exit_seconds", "commit_seconds", "memory_linger_seconds"):
            seconds = getattr(self, name)
            is_time = isinstance(seconds, (int, float)) and 0 <= seconds < math.inf
            _check(is_time, f"{name} must be a finite number of seconds, 0 or more", seconds)
        layouts = ("shared", "local")
        _check(self.layout in layouts, "layout must be 'shared' or 'local'", self.layout)
        modes = (None, "host", "device_copy", "transfer")
        rule = "snapshot_mode must be None, 'host', 'device_copy' or 'transfer'"
        _check(self.snapshot_mode in modes, rule, self.snapshot_mode)


def _check(is_good: bool, rule: str, received: object) -> None:
    if not is_good:
        raise ValueError(f"{rule}. Received: {received!r}")
