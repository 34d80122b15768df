"""What several processes agree to restore from disks of their own; threads stand for the processes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from messages import Messages
from test_joint_copies import Disks

import offstep
from offstep.coordination import Group
from offstep.joint_discovery import may_be_on_own_disks, open_together
from offstep.stored import Region
from offstep.stores.path import open_place

STORE = open_place("gs://bucket/run")


def open_all(roots: Sequence[Path], client: Messages, key: str = "offstep/restore/1") -> list[int | str]:
    """Returns the step that each process has opened, or why it has not; reads this process's rows."""

    def open_one(process: int) -> int | str:
        try:
            reader = open_together(Group(process, len(roots), client), key, [roots[process]], verify="fast")
        except offstep.CheckpointNotFound as error:
            return str(error)
        try:
            rows = next(leaf for leaf in reader.contents.leaves if leaf.name == "rows")
            start, stop = 32 * process, 32 * (process + 1)
            [found] = reader.read([Region(rows, ((start, stop), (0, 64)))], 1)
            np.testing.assert_array_equal(found, (np.arange(64 * 64, dtype=np.float32).reshape(64, 64) / 2)[start:stop])
            return int(reader.contents.manifest["step"])
        finally:
            reader.close()

    with ThreadPoolExecutor(len(roots)) as pool:
        return list(pool.map(open_one, range(len(roots))))


@pytest.fixture
def hosts(tmp_path: Path) -> list[Path]:
    """Directories of two hosts with the parts of step 5."""
    disks = Disks(tmp_path / "disks", "gs://bucket/run", scale=64)
    for process, source in enumerate(disks.sources):
        shutil.copytree(source, tmp_path / f"host_{process}" / f"process_{process}" / "5")
    return [tmp_path / "host_0", tmp_path / "host_1"]


def test_what_a_process_left_on_a_host_where_it_no_longer_is_hides_nothing(hosts: list[Path]) -> None:
    """Host 0 was that of process 1 before: the steps that both directories have were none."""
    shutil.copytree(hosts[1] / "process_1" / "5", hosts[0] / "process_1" / "4")
    assert open_all(hosts, Messages()) == [5, 5]


def test_a_step_whose_parts_are_not_all_there_is_none(hosts: list[Path]) -> None:
    shutil.rmtree(hosts[1])
    shutil.copytree(hosts[0], hosts[1])
    told = open_all(hosts, Messages())
    assert ["that all processes have" in str(text) for text in told] == [True, True]


def test_hosts_that_have_changed_places_and_lack_what_they_need_are_told_so_together(hosts: list[Path]) -> None:
    """Each found nothing to read only after all had agreed to read it."""
    with pytest.warns(RuntimeWarning, match="step 5 is passed over: process 0: .*rows"):
        told = open_all(hosts[::-1], Messages())
    assert ["that all processes can read" in str(text) for text in told] == [True, True]


def test_a_disk_that_cannot_be_read_is_told_to_all_and_nobody_waits(hosts: list[Path]) -> None:
    with pytest.warns(RuntimeWarning, match="long is passed over, it cannot be read"):
        told = open_all([hosts[0].parent / ("long" * 100), hosts[1]], Messages())
    assert ["that all processes have" in str(text) for text in told] == [True, True]


def test_nobody_reads_what_was_said_for_a_restore_before(hosts: list[Path]) -> None:
    client = Messages()
    for number in (1, 2):
        assert open_all(hosts, client, f"offstep/restore/{number}") == [5, 5]
    assert {key.split("/")[2] for key in client.texts} == {"2"}


def test_a_service_that_is_gone_is_said_as_the_absence_of_a_checkpoint(hosts: list[Path]) -> None:
    client = Messages()
    client.is_lost = True
    assert ["it is not known which steps" in str(text) for text in open_all(hosts, client)] == [True, True]


def test_who_restores_for_himself_does_not_wait_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an empty directory beside the store each process waited 300 s for others that had not to come."""
    assert may_be_on_own_disks([tmp_path / "new", STORE], is_spread=True)
    assert not may_be_on_own_disks([tmp_path / "new", STORE], is_spread=False)
    with offstep.Checkpointer(tmp_path / "steps") as checkpointer:
        checkpointer.save(3, {"w": jnp.ones(3)})
    assert not may_be_on_own_disks([tmp_path / "steps", STORE], is_spread=True)
    client = Messages()
    monkeypatch.setattr("offstep.restoration.find_group", lambda: Group(1, 2, client))
    report = offstep.restore({"w": jnp.zeros(3)}, tmp_path / "steps", local=tmp_path / "new")
    assert (report.step, client.texts) == (3, {})


def test_a_directory_that_cannot_be_asked_is_passed_over(tmp_path: Path) -> None:
    with offstep.Checkpointer(tmp_path / "steps") as checkpointer:
        checkpointer.save(3, {"w": jnp.ones(3)})
    with pytest.warns(RuntimeWarning, match="one place cannot be asked"):
        report = offstep.restore({"w": jnp.zeros(3)}, tmp_path / "steps", local=tmp_path / ("long" * 100))
    assert report.step == 3
