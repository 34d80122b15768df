"""Processes that each have a disk of their own: each writes all that it holds, and restores it; or one reads all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import joint
import numpy as np
import pytest
from orbax.checkpoint import v1
from test_joint import list_expected

import offstep
from offstep import catalog
from offstep._native import crc32c
from offstep.formats.local_reader import list_common_steps, list_parts


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hosts")
    arguments = {"layout": "local", "max_to_keep": 2}
    told = joint.run("joint_trees.py", 2, directory, do="save", steps=[1, 2, 3], arguments=arguments, is_on_hosts=True)
    assert [report["failures"] for report in told] == [[], []]
    return directory


@pytest.fixture
def gathered(saved: Path, tmp_path: Path) -> Path:
    """What all hosts have, brought together."""
    for process in (0, 1):
        name = f"process_{process}"
        shutil.copytree(saved / f"host_{process}" / name, tmp_path / "all" / name)
    return tmp_path / "all"


def test_each_process_keeps_its_steps_on_its_own_disk(saved: Path) -> None:
    for process in (0, 1):
        host = saved / f"host_{process}"
        assert [entry.name for entry in host.iterdir()] == [f"process_{process}"]
        own = host / f"process_{process}"
        assert {entry.name for entry in own.iterdir()} == {"2", "3"}
        # What both hold is on both disks.
        assert np.array_equal(offstep.read(own / "3", "odd"), list_expected(3)["odd"])


def test_each_process_restores_from_its_own_disk_the_newest_step_that_all_have(saved: Path, tmp_path: Path) -> None:
    told = joint.run("joint_trees.py", 2, saved, do="restore", steps=[3], newest=True, is_on_hosts=True)
    assert told == [{"step": 3, "wrong": []}] * 2
    shutil.copytree(saved, tmp_path / "hosts")
    shutil.rmtree(tmp_path / "hosts" / "host_1" / "process_1" / "3")
    told = joint.run("joint_trees.py", 2, tmp_path / "hosts", do="restore", steps=[2], newest=True, is_on_hosts=True)
    assert told == [{"step": 2, "wrong": []}] * 2


def test_one_process_restores_what_is_brought_together(gathered: Path) -> None:
    told = joint.run("joint_trees.py", 1, gathered, do="restore", steps=[3], newest=True)
    assert told == [{"step": 3, "wrong": []}]
    for name, values in list_expected(3).items():
        assert np.array_equal(offstep.read(gathered, name), values), name


def test_a_step_that_one_process_lacks_is_none(gathered: Path) -> None:
    shutil.rmtree(gathered / "process_1" / "3")
    assert joint.run("joint_trees.py", 1, gathered, do="restore", steps=[2], newest=True) == [{"step": 2, "wrong": []}]


def test_a_step_that_disks_have_of_different_saves_is_none(gathered: Path) -> None:
    """One process was killed before it came again to a step that the other still had from a run before."""
    parts = list_parts(gathered)
    assert list(list_common_steps(parts)) == [2, 3]
    path = parts[1] / "3" / "offstep.json"
    document = json.loads(path.read_bytes())
    del document["crc32c"]
    document["save"] += "0"
    text = json.dumps(document, separators=(",", ":")).encode()
    path.write_bytes(text[:-1] + b',"crc32c":"%08x"}' % crc32c(text))
    assert list(list_common_steps(parts)) == [2]


def test_nobody_takes_a_part_for_the_whole(saved: Path) -> None:
    part = saved / "host_0" / "process_0" / "3"
    with pytest.raises(offstep.CheckpointDamaged, match="axis_0: a part of it is missing"):
        offstep.read(part, "axis_0")
    with pytest.raises(Exception, match=r"(?i)missing|not found"):
        v1.load(part, {"axis_0": np.zeros((16, 24, 6), np.float32)}, checkpointable_name="pytree")


def test_a_step_that_one_could_not_write_goes_on_all(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "hosts")
    options = {"do": "suffer", "steps": [4], "is_on_hosts": True}
    arguments = {"layout": "local", "commit_seconds": 3.0}
    fault = {"call": "put", "does": "SIGKILL"}
    trainers = joint.start(
        "joint_trees.py",
        2,
        tmp_path / "hosts",
        [options | {"arguments": arguments}, options | {"arguments": arguments, "fault": fault}],
    )
    try:
        trainers[0].read()
    finally:
        for trainer in trainers:
            trainer.kill()
    assert "process 1 of 2 has not reported" in trainers[0].report["failures"][0]
    assert catalog.list_steps(tmp_path / "hosts" / "host_0" / "process_0") == [2, 3]
