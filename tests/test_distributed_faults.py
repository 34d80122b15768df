"""What becomes of the checkpoint of several processes when one fails: a whole step or none, and never a hang."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import failing_disk
import joint
import numpy as np
import pytest
from test_joint import list_expected

import offstep
from offstep import catalog

COMMIT_SECONDS = 3.0
LATEST_SECONDS = COMMIT_SECONDS + 1.0 + 10.0  # the others' grace, and a machine that others use too
ARGUMENTS = {"commit_seconds": COMMIT_SECONDS, "retry_seconds": 0.0}


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds step 1."""
    directory = tmp_path_factory.mktemp("older")
    joint.run("joint_trees.py", 2, directory, do="save", steps=[1])
    return directory


@pytest.fixture
def root(older: Path, tmp_path: Path) -> Iterator[Path]:
    subprocess.run(["cp", "-r", str(older), str(tmp_path / "root")], check=True)
    yield tmp_path / "root"
    assert_whole(tmp_path / "root", 1)  # whatever happened


def assert_whole(root: Path, step: int) -> None:
    assert offstep.verify(root / str(step)).ok
    for name, values in list_expected(step).items():
        assert np.array_equal(offstep.read(root / str(step), name), values), name


def suffer(root: Path, fault: dict[str, Any], *, process: int = 1, count: int = 2) -> list[joint.Trainer]:
    """Saves step 2 while one process has a fault; returns the processes, which have ended."""
    options: list[dict[str, Any]] = [{"do": "suffer", "steps": [2], "arguments": ARGUMENTS} for _ in range(count)]
    options[process] |= {"fault": fault}
    trainers = joint.start("joint_trees.py", count, root, options)
    try:
        # First the others, with which the one with the fault may have to be continued.
        for trainer in trainers:
            if trainer is not trainers[process]:
                trainer.read()
        trainers[process].go_on()
        if fault["does"] != "nothing":
            trainers[process].read()
        for trainer in reversed(trainers):  # with the first one JAX's service goes
            trainer.end()
    finally:
        for trainer in trainers:
            trainer.kill()
    return trainers


def assert_failed(told: joint.Trainer, words: str) -> None:
    assert told.status == 0, told.errors
    [failure] = told.report["failures"]
    assert words in failure
    assert "checkpoints saved before it are untouched" in failure
    assert told.report["waited"] < LATEST_SECONDS


def assert_half_steps_never_show(root: Path) -> None:
    assert set(catalog.named_steps(root)) <= {1, 2}
    if 2 in catalog.named_steps(root):
        assert_whole(root, 2)


def assert_next_run_saves(root: Path) -> None:
    """A later run sweeps what is left, and saves."""
    told = joint.run("joint_trees.py", 2, root, do="save", steps=[3])
    assert [report["failures"] for report in told] == [[], []]
    assert_whole(root, 3)
    assert {entry.name for entry in root.iterdir()} <= {"1", "2", "3"}


def test_a_process_that_dies_before_it_reports_is_named(root: Path) -> None:
    healthy, dead = suffer(root, {"call": "put", "does": "SIGKILL"})
    assert dead.status == -signal.SIGKILL
    assert_failed(healthy, "process 1 of 2 has not reported its share within 3 s")
    assert catalog.list_steps(root) == [1]
    assert_next_run_saves(root)


def test_a_process_that_stands_still_is_named_and_hears_of_it_later(root: Path) -> None:
    for told in suffer(root, {"call": "put", "does": "SIGSTOP"}):
        assert_failed(told, "process 1 of 2 has not reported its share within 3 s")
    assert catalog.list_steps(root) == [1]


def test_a_process_that_never_saves_is_named(root: Path) -> None:
    healthy, _ = suffer(root, {"does": "nothing"})
    assert_failed(healthy, "process 1 of 2 has not reported its share within 3 s")
    assert {entry.name for entry in root.iterdir()} == {"1"}


def test_a_full_disk_of_one_process_is_told_by_all_at_once(root: Path, tmp_path: Path, entries: Path) -> None:
    entry = failing_disk.write_entry(entries, "'write', failing_disk.fail_with(28), always=True")
    for told in suffer(root, {"entry": entry, "does": "fail"}):
        assert_failed(told, "No space left on device")
        assert told.report["waited"] < COMMIT_SECONDS
    assert {entry.name for entry in root.iterdir()} == {"1"}


def test_a_primary_that_dies_before_it_decides_leaves_no_step(root: Path) -> None:
    dead, other = suffer(root, {"call": "get", "after": True, "does": "SIGKILL"}, process=0)
    assert dead.status == -signal.SIGKILL
    if other.status == 0:  # else JAX has ended it, because process 0 ran the coordination service
        assert_failed(other, "")
    assert_half_steps_never_show(root)
    assert_next_run_saves(root)


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for the modules of writers, which the processes find."""
    directory = tmp_path / "entries"
    directory.mkdir()
    paths = [str(directory), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    monkeypatch.setenv("PYTHONPATH", ":".join(paths))
    return directory


# ---------------------------------------------------------------------------------------------------------- campaign


def assert_others_tell(told: list[joint.Trainer], process: int | None, root: Path) -> None:
    """All but one say whether step 2 is there or that it may still come, unless JAX has ended them with process 0."""
    is_there = 2 in catalog.list_steps(root)
    for number, trainer in enumerate(told):
        if number != process and trainer.status == 0:
            failures = trainer.report["failures"]
            is_unsure = failures and "it may still appear there" in failures[0]
            assert is_unsure or bool(failures) != is_there, trainer.errors
            assert trainer.report["waited"] < LATEST_SECONDS


MESSAGES = [
    {"call": call, "nth": nth, "after": after}
    for call, most in (("put", 2), ("get", 1))
    for nth in range(1, most + 1)
    for after in (False, True)
]


@pytest.mark.campaign
@pytest.mark.parametrize("repeat", range(10))
@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: "-".join(map(str, message.values())))
def test_killed_at_every_message(message: dict[str, Any], process: int, repeat: int, root: Path) -> None:
    told = suffer(root, message | {"does": "SIGKILL"}, process=process)
    assert_others_tell(told, process, root)
    assert_half_steps_never_show(root)
    assert_next_run_saves(root)


@pytest.mark.campaign
@pytest.mark.parametrize("nth", range(1, 45))
@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("victim", ["os.getppid()", "os.getpid()"], ids=["trainer", "writer"])
def test_killed_at_every_call_of_a_writer(victim: str, process: int, nth: int, root: Path, entries: Path) -> None:
    marker = entries / "once"
    action = f"failing_disk.kill_once({victim!r}, Path({str(marker)!r}))"
    entry = failing_disk.write_entry(entries, f"'any', {action}, nth={nth}")
    told = suffer(root, {"entry": entry, "does": "fail"}, process=process)
    assert_others_tell(told, process if victim == "os.getppid()" else None, root)
    if victim == "os.getpid()" and marker.exists():  # another writer does it again
        assert 2 in catalog.list_steps(root)
    assert_half_steps_never_show(root)
    assert_next_run_saves(root)


@pytest.mark.campaign
@pytest.mark.parametrize("repeat", range(10))
def test_stopped_absent_and_full_again_and_again(repeat: int, root: Path, entries: Path) -> None:
    process = repeat % 2
    entry = failing_disk.write_entry(entries, "'write', failing_disk.fail_with(28), always=True")
    for fault in ({"call": "put", "does": "SIGSTOP"}, {"does": "nothing"}, {"entry": entry, "does": "fail"}):
        for number, told in enumerate(suffer(root, fault, process=process)):
            if number != process or "entry" in fault:
                assert_failed(told, "")
        assert catalog.list_steps(root) == [1]
