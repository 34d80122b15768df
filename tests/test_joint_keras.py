"""Keras models trained by several processes at once: saved while they train, restored by stock Keras and by ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import joint
import pytest
from runs import fit, make_model

from offstep import ModelCheckpoint, catalog, holders, keras_saving, processes
from offstep.coordination import Group


def train(kind: str, count: int, directory: Path, batches: int) -> None:
    told = joint.run("joint_keras.py", count, directory, do="train", kind=kind, batches=batches)
    steps = list(range(2, batches + 1, 2))
    assert told == [{"durable": len(steps), "failed": 0}] * count
    assert catalog.list_steps(directory / "root") == steps


@pytest.fixture(scope="module", params=["data", "model"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    train(request.param, 2, directory, 6)
    return directory


def test_stock_keras_loads_it_in_one_process(saved: Path) -> None:
    assert joint.run("joint_keras.py", 1, saved, do="load", steps=[6]) == [{"wrong": []}]


def test_our_restore_puts_every_step_on_two_processes_distributed_otherwise(saved: Path) -> None:
    other = {"data": "model", "model": "data"}[saved.name[:-1]]
    told = joint.run("joint_keras.py", 2, saved, do="restore", kind=other, steps=[2, 4, 6])
    assert told == [{"wrong": [], "devices": 4}] * 2


def test_no_collective_runs_because_of_a_save(tmp_path: Path) -> None:
    for report in joint.run("joint_keras.py", 2, tmp_path, do="count", kind="model", batches=6):
        without_saves, with_saves = report["counts"]
        assert without_saves["all-reduce"] >= 6
        assert with_saves == without_saves


@pytest.mark.campaign
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", ["data", "model"])
@pytest.mark.parametrize("count", [2, 4])
def test_every_second_of_a_hundred_batches(count: int, kind: str, tmp_path: Path) -> None:
    train(kind, count, tmp_path, 100)
    steps = list(range(2, 101, 2))
    assert joint.run("joint_keras.py", 1, tmp_path, do="load", steps=steps) == [{"wrong": []}]
    for number in (1, 2, 4):
        told = joint.run("joint_keras.py", number, tmp_path, do="restore", kind="data", steps=steps)
        assert [report["wrong"] for report in told] == [[]] * number


@pytest.mark.parametrize(
    ("arguments", "name", "words"),
    [
        ({"save_freq": "10s"}, "{step}", "none may decide by what only it can tell: a clock"),
        ({"on_busy": "skip"}, "{step}", "on_busy must be 'wait'"),
        ({}, "{step}.keras", "save to a directory, such as 'ckpts/{step}'"),
    ],
)
def test_what_one_process_would_decide_for_itself_is_refused(
    arguments: dict[str, Any], name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One process cannot make an array of several, so this one's is taken for one.
    monkeypatch.setattr(holders, "spans_processes", lambda _: True)
    for module in (keras_saving, processes):
        monkeypatch.setattr(module, "spans_processes", lambda _: True)
    monkeypatch.setattr(processes, "find_group", lambda: Group(0, 2, None))
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        fit(make_model(), [ModelCheckpoint(tmp_path / name, **arguments)])
