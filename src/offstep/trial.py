"""Trainings that are timed, each with another callback and in a process of its own: none inherits from another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from offstep import buffers, commit
from offstep.errors import BudgetExceeded

PEERS = {
    "offstep": "offstep, directories",
    "offstep_keras": "offstep, .keras",
    "model_checkpoint": "keras ModelCheckpoint, .keras",
    "orbax_checkpoint": "keras OrbaxCheckpoint",
}
"""Who saves, and what a table calls it."""

_SNAPSHOTS_IN_MEMORY = 5  # the state, what a step adds to it, and copies of it that wait to be written
_CHECKPOINTS_ON_DISK = 4


@dataclass(frozen=True)
class Spec:
    """What is trained and how often it is saved.

    Attributes:
        directory: Where the checkpoints go; it exists.
        state_bytes: Size of the state.
        leaves: Number of its arrays.
        step_seconds: How long a training step shall take.
        every: Batches from save to save, one `fit` for each.
        saves: Saves that are timed in each.
        peer: A name in `PEERS`.
        rounds: Work that is added to each step; `None` finds out how much makes it long enough.
    """

    directory: str
    state_bytes: int
    leaves: int
    step_seconds: float
    every: tuple[int, ...]
    saves: int = 3
    peer: str = "offstep"
    rounds: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        data = json.loads(text)
        return cls(**data | {"every": tuple(data["every"])})


@dataclass(frozen=True)
class Run:
    """What one `fit` took; seconds.

    Attributes:
        every: Batches from save to save.
        saves: Saves that were timed.
        wall_seconds: From the first timed step until all steps were done and all saves finished.
        call_seconds: For each save, how much longer than without it the training thread was between two steps.
        finished_seconds: From the end of the step until its checkpoint was finished, for some of the saves.
        steps: Begin and end of each timed step, from the first one's begin on.
    """

    every: int
    saves: int
    wall_seconds: float
    call_seconds: tuple[float, ...]
    finished_seconds: tuple[float, ...]
    steps: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Trial:
    """What one process has found.

    Attributes:
        peer: A name in `PEERS`.
        state_bytes: Size of the state that was really saved.
        leaves: Number of its arrays.
        device: What it was trained on.
        rounds: Work that was added to each step.
        plain_seconds: Of each step without a callback, before the saving runs and after them.
        runs: One for each frequency.
    """

    peer: str
    state_bytes: int
    leaves: int
    device: str
    rounds: int
    plain_seconds: tuple[tuple[float, ...], tuple[float, ...]]
    runs: tuple[Run, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Trial:
        data = json.loads(text)
        runs = tuple(Run(**_with_tuples(run)) for run in data.pop("runs"))
        return cls(**_with_tuples(data), runs=runs)


def run_trials(spec: Spec, say: Callable[[str], None]) -> tuple[list[Trial], dict[str, str]]:
    """Trains once for each peer, in a directory of its own below that of `spec`, which is deleted again.

    Args:
        spec: What to do; `peer` and `rounds` are not looked at.
        say: Is told what goes on.

    Returns:
        What was found, and for each peer that failed the end of what it said.

    Raises:
        BudgetExceeded: the machine has not the memory for such a state.
        OSError: it cannot be saved in the directory.
    """
    _check_memory(spec.state_bytes)
    _check_disk(Path(spec.directory), spec.state_bytes)
    trials: list[Trial] = []
    failures: dict[str, str] = {}
    for peer, label in PEERS.items():
        say(f"training with {label} ...")
        rounds = trials[0].rounds if trials else None
        with _directory_below(Path(spec.directory)) as directory:
            found = _run(replace(spec, peer=peer, directory=str(directory), rounds=rounds))
        if isinstance(found, Trial):
            trials.append(found)
        else:
            failures[peer] = found
    return trials, failures


def _run(spec: Spec) -> Trial | str:
    """Returns what a fresh process finds, or why it finds nothing."""
    answer, log = Path(spec.directory, "trial.json"), Path(spec.directory, "output")
    command = [sys.executable, "-m", "offstep.keras_trial", spec.to_json(), str(answer)]
    environment = os.environ | {"KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        try:
            status = process.wait()
        finally:
            process.kill()
    if status != 0:
        lines = log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {status}"
    return Trial.from_json(answer.read_text())


@contextmanager
def _directory_below(directory: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix=".offstep-bench-", dir=directory))
    try:
        yield path
    finally:
        commit.delete(path)


def _check_memory(state_bytes: int) -> None:
    available = buffers.available_bytes()
    if available < _SNAPSHOTS_IN_MEMORY * state_bytes:
        raise BudgetExceeded(
            f"a trial with {state_bytes:,} bytes of state takes about {_SNAPSHOTS_IN_MEMORY} times as much host "
            f"memory, and {available:,} bytes are available: give less with --state"
        )


def _check_disk(directory: Path, state_bytes: int) -> None:
    commit.probe_directory(directory)
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if free < _CHECKPOINTS_ON_DISK * state_bytes:
        raise BudgetExceeded(
            f"a trial with {state_bytes:,} bytes of state takes up to {_CHECKPOINTS_ON_DISK} times as much on the "
            f"disk, and {directory} has {free:,} bytes: give less with --state"
        )


def _with_tuples(data: dict[str, Any]) -> dict[str, Any]:  # JSON
    return {name: _as_tuple(value) for name, value in data.items()}


def _as_tuple(value: Any) -> Any:  # JSON
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
