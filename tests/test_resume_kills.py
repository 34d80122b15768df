"""Trainings that are killed with SIGKILL again and again, and started again by the same command.

pytest tests/test_resume_kills.py -m campaign      20 kills in a row in each of the four ways to save
"""

from __future__ import annotations

import json
import random
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import interpreters
import pytest
from interpreters import Interpreter
from processes import find_writers, wait_for_end
from resume_digits import BATCHES, MODES

pytestmark = pytest.mark.crash

SCRIPT = Path(__file__).with_name("resume_digits.py")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("mode", "moments"), [("batch", [6, 13]), ("memory", [15])])
def test_killed_it_ends_with_the_same_bits(tmp_path: Path, mode: str, moments: list[int]) -> None:
    check_kills(tmp_path / "backup", mode, moments, epochs=2)


@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", MODES)
def test_killed_twenty_times_it_ends_with_the_same_bits(tmp_path: Path, mode: str) -> None:
    check_kills(tmp_path / "backup", mode, choose_moments(mode, 20, count_steps(mode), epochs=6), epochs=6)


def count_steps(mode: str) -> int:
    """Returns how many batches of an epoch are announced."""
    return BATCHES // MODES[mode].get("steps_per_execution", 1)


def check_kills(directory: Path, mode: str, moments: list[int], epochs: int) -> None:
    reached = 0  # the batch of its epoch that was last announced
    for moment in moments:
        lines = run_until_killed(mode, epochs, directory, moment)
        check_loss(mode, reached, lines)
        reached = read_batch(lines[-1])
    *lines, result = run(mode, epochs, directory)
    check_loss(mode, reached, lines)
    assert json.loads(result) == expected_result(mode, epochs)
    assert len(lines) < count_steps(mode) * (epochs - 1), "it has begun anew"
    assert not directory.exists()


def choose_moments(mode: str, kills: int, per_epoch: int, epochs: int) -> list[int]:
    """Returns after which batch of its own each run is killed, so that the training is not finished before the last."""
    draw = random.Random(f"{mode} {kills}").randint
    if mode != "epoch":
        # A backup after every batch: spread over the whole run. A resumed one announces two batches before it gets on.
        return [draw(1, 2 + 3 * per_epoch * epochs // (2 * kills)) for _ in range(kills)]
    # Every fourth kill comes in the epoch after the first, which then is behind it; the others repeat their epoch.
    return [draw(1, per_epoch) + per_epoch * (number % 4 == 3) for number in range(kills)]


def check_loss(mode: str, reached: int, lines: list[str]) -> None:
    """In memory there is every batch: one may be lost, and one is announced in whose place the snapshot is put back."""
    if mode == "memory":
        assert (reached - read_batch(lines[0])) % BATCHES <= 2


def read_batch(line: str) -> int:
    return int(line.removeprefix("batch "))


@cache
def expected_result(mode: str, epochs: int) -> Any:  # JSON
    return json.loads(run(mode, epochs)[-1])


def run(mode: str, epochs: int, *arguments: Path) -> list[str]:
    finished = interpreters.run([SCRIPT, mode, str(epochs), *arguments])
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


def run_until_killed(mode: str, epochs: int, directory: Path, count: int) -> list[str]:
    """Kills the trainer after it has announced `count` batches, and returns what it said; waits for its writer to end,
    unless that waits for the next run.

    A training that ends before that is left alone: the next one then finds nothing to resume.
    """
    command = [SCRIPT, mode, str(epochs), directory]
    with Interpreter(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        assert trainer.stderr is not None
        lines = []
        for _ in range(count):
            lines.append(trainer.stdout.readline())
            assert lines[-1].startswith("batch"), trainer.stderr.read() or f"it ended early with {lines[-1]!r}"
        writers = find_writers(trainer.pid)
        trainer.kill()
    for writer in writers if mode != "memory" else []:
        wait_for_end(writer.pid)
    return lines
