"""Trainings of several processes that are killed and started again by the same command: they end with the same bits.

pytest tests/test_joint_resume.py -m campaign      ten kills in a row, two and four processes, directories and buckets
"""

from __future__ import annotations

import random
import shutil
import signal
from functools import cache
from pathlib import Path
from typing import Any

import joint
import pytest
from fault_proxy import Proxy
from object_stores import Server, below, download, gs_only, list_objects, proxy, run, s3_only, store, through
from processes import wait_for_end
from test_store_faults import is_probe

import offstep
from offstep import catalog
from offstep.stores.path import open_place

__all__ = ["proxy", "run", "store"]  # fixtures

pytestmark = pytest.mark.crash

SCRIPT = "joint_resume.py"
FREQUENT = {"saver": "checkpoint", "arguments": {"save_freq": 1, "max_to_keep": 3}}
LOCAL = {
    "saver": "backup",
    "arguments": {"save_freq": 1, "double_checkpoint": True, "layout": "local"},
    "is_on_hosts": True,
}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


@cache
def run_whole(count: int, kind: str, directory: Path) -> list[dict[str, Any]]:
    """Returns what the processes are left with if nobody kills them."""
    return joint.run(SCRIPT, count, directory / "whole", kind=kind)


def run_until_killed(count: int, directory: Path, options: dict[str, Any], batches: int) -> None:
    """Kills all processes after the first one has announced that many batches; waits for their writers to end."""
    trainers = joint.start(SCRIPT, count, directory, [options] * count)
    try:
        trainers[0].read_lines("batch", batches)
        writers = [writer for trainer in trainers for writer in trainer.find_writers()]
    finally:
        for trainer in trainers:
            trainer.kill()
    assert writers, trainers[0].errors
    for writer in writers:
        wait_for_end(writer.pid)


def assert_same(told: list[dict[str, Any]], count: int, kind: str, elsewhere: Path, *says: str) -> None:
    """They have the bits of an uninterrupted run, and have said nothing but what contains these words."""
    expected = run_whole(count, kind, elsewhere)
    for report, whole in zip(told, expected, strict=True):
        assert len(report["said"]) == len(says), report["said"]
        assert all(words in said for words, said in zip(says, report["said"], strict=True)), report["said"]
        assert report | {"said": []} == whole


@pytest.mark.timeout(300)
@pytest.mark.timeout(300)
def test_killed_in_mid_epoch_they_end_with_the_same_bits(tmp_path: Path, elsewhere: Path) -> None:
    options = {"kind": "model", **FREQUENT}
    run_until_killed(2, tmp_path, options, 9)
    assert catalog.list_steps(tmp_path / "root")
    assert_same(joint.run(SCRIPT, 2, tmp_path, **options), 2, "model", elsewhere)


@pytest.mark.timeout(300)
def test_so_they_do_from_disks_of_their_own_of_which_one_is_damaged(tmp_path: Path, elsewhere: Path) -> None:
    options = {"kind": "model", **LOCAL}
    run_until_killed(2, tmp_path, options, 9)
    parts = [tmp_path / f"host_{number}" / "root" / f"process_{number}" for number in (0, 1)]
    newest = max(set(catalog.list_steps(parts[0])) & set(catalog.list_steps(parts[1])))
    damage(parts[1] / str(newest))
    told = joint.run(SCRIPT, 2, tmp_path, **options)
    assert_same(told, 2, "model", elsewhere, "an older checkpoint is tried: process 1: ")
    assert not list(tmp_path.glob("host_*/root")), "finished, they need no backup"


@s3_only
@pytest.mark.timeout(300)
def test_so_they_do_from_a_bucket(run: str, tmp_path: Path, elsewhere: Path) -> None:
    options = {"kind": "model", **FREQUENT, "filepath": below(run, "{step}"), "settles_at": 8}
    run_until_killed(2, tmp_path, options, 9)
    newest = catalog.list_steps(open_place(run))[-1]
    assert 7 <= newest < 10, "in mid-epoch"
    copy = download(below(run, str(newest)), tmp_path / "root" / str(newest))
    assert {path.name for path in copy.glob("offstep-extra*")} == {"offstep-extra", "offstep-extra.process_1"}
    assert offstep.verify(copy).ok
    assert len(list(copy.glob("pytree/ocdbt.process_1/d/*"))) == 1, "there it was only on its way"
    assert_same(joint.run(SCRIPT, 2, tmp_path, **options), 2, "model", elsewhere)


def damage(checkpoint: Path) -> None:
    data = max((checkpoint / "pytree").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    content[:1024] = bytes(byte ^ 1 for byte in content[:1024])
    data.write_bytes(content)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("told", [[0, 1], pytest.param([1], marks=pytest.mark.campaign)], ids=["all", "one"])
def test_told_to_end_they_all_save_at_the_next_batch(told: list[int], tmp_path: Path, elsewhere: Path) -> None:
    arguments = {"save_freq": 1000, "save_on_preemption": True}
    options = {"kind": "model", "saver": "checkpoint", "arguments": arguments}
    trainers = joint.start(SCRIPT, 2, tmp_path, [options] * 2)
    try:
        trainers[0].read_lines("batch", 7)
        writers = [writer for trainer in trainers for writer in trainer.find_writers()]
        for number in told:
            trainers[number].terminate()
        for number in told:
            trainers[number].end()
    finally:
        for trainer in trainers:
            trainer.kill()
    for writer in writers:
        wait_for_end(writer.pid)
    for number in told:
        assert trainers[number].status == -signal.SIGTERM, trainers[number].errors
        assert "at SIGTERM" not in trainers[number].errors
    [step] = catalog.list_steps(tmp_path / "root")
    assert 7 <= step < 15
    assert_same(joint.run(SCRIPT, 2, tmp_path, **options), 2, "model", elsewhere)


# ---------------------------------------------------------------------------------------------------------- campaign


@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.parametrize("saver", [FREQUENT, LOCAL], ids=["shared", "local"])
@pytest.mark.parametrize("kind", ["data", "model"])
@pytest.mark.parametrize("count", [2, 4])
def test_killed_ten_times_they_end_with_the_same_bits(
    count: int, kind: str, saver: dict[str, Any], tmp_path: Path, elsewhere: Path
) -> None:
    options = {"kind": kind, **saver}
    draw = random.Random(f"{count} {kind}").randint
    for _ in range(10):
        run_until_killed(count, tmp_path, options, draw(1, 4))
    assert_same(joint.run(SCRIPT, count, tmp_path, **options), count, kind, elsewhere)


@pytest.mark.campaign
def test_another_number_of_processes_begins_the_epoch_again(tmp_path: Path) -> None:
    options = {"kind": "data", **FREQUENT}
    run_until_killed(2, tmp_path, options, 8)
    [told] = joint.run(SCRIPT, 1, tmp_path, **options)
    assert told["epochs"] == [0, 1, 2]
    assert "the number of processes was 2, now it is 1" in told["said"][0]


@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["data", "model"])
@pytest.mark.parametrize("count", [2, 4])
def test_killed_ten_times_they_end_with_the_same_bits_from_a_bucket(
    count: int, kind: str, run: str, tmp_path: Path, elsewhere: Path
) -> None:
    options = {"kind": kind, **FREQUENT, "filepath": below(run, "{step}")}
    draw = random.Random(f"{count} {kind} bucket").randint
    for _ in range(10):
        run_until_killed(count, tmp_path, options, draw(1, 4))
    assert_same(joint.run(SCRIPT, count, tmp_path, **options), count, kind, elsewhere)


@gs_only
@pytest.mark.campaign
@pytest.mark.parametrize("now", [1, 4])
def test_another_number_of_processes_begins_the_epoch_again_from_a_bucket(now: int, run: str, tmp_path: Path) -> None:
    options = {"kind": "data", **FREQUENT, "filepath": below(run, "{step}")}
    run_until_killed(2, tmp_path, options | {"settles_at": 7}, 8)
    told = joint.run(SCRIPT, now, tmp_path, **options)
    for report in told:
        assert report["epochs"] == [0, 1, 2]
        assert f"the number of processes was 2, now it is {now}" in report["said"][0]


@gs_only
@pytest.mark.campaign
def test_a_download_of_the_bucket_is_gone_on_from(run: str, tmp_path: Path, elsewhere: Path) -> None:
    options = {"kind": "model", **FREQUENT}
    run_until_killed(2, tmp_path, options | {"filepath": below(run, "{step}"), "settles_at": 8}, 9)
    newest = str(catalog.list_steps(open_place(run))[-1])
    download(below(run, newest), tmp_path / "root" / newest)
    assert_same(joint.run(SCRIPT, 2, tmp_path, **options), 2, "model", elsewhere)


@gs_only
@pytest.mark.campaign
@pytest.mark.timeout(300)
@pytest.mark.parametrize("loser", [0, 1, None])
def test_so_they_do_from_the_bucket_behind_their_disks_when_one_is_lost(
    loser: int | None, run: str, tmp_path: Path, elsewhere: Path
) -> None:
    options = {
        "kind": "model",
        "saver": "checkpoint",
        "arguments": {"save_freq": 1, "layout": "local", "local_max_to_keep": 3},
        "filepath": below(run, "{step}"),
        "is_on_hosts": True,
        "has_tiers": True,
    }
    run_until_killed(2, tmp_path, options | {"settles_at": 8}, 9)
    copied = catalog.list_steps(open_place(run))[-1]
    assert 7 <= copied < 10, "in mid-epoch"
    extras = {path.name for path in (open_place(run) / str(copied)).iterdir() if path.name.startswith("offstep-extra")}
    assert extras == {"offstep-extra", "offstep-extra.process_1"}
    if loser is not None:
        shutil.rmtree(tmp_path / f"host_{loser}")
    told = joint.run(SCRIPT, 2, tmp_path, **options)
    for number, (report, whole) in enumerate(zip(told, run_whole(2, "model", elsewhere), strict=True)):
        assert report | {"said": []} == whole
        is_said = loser is not None and number != loser and len(report["said"]) > 0
        assert report["said"] == [] or (is_said and "not all processes have it" in report["said"][0]), report["said"]
    assert offstep.verify(run).ok


@gs_only
@pytest.mark.campaign
def test_all_are_told_that_nobody_may_read_the_bucket(proxy: Proxy, store: Server, run: str, tmp_path: Path) -> None:
    options = {"kind": "model", **FREQUENT, "filepath": below(through(proxy, store, run), "{step}")}
    proxy.fail("403", lambda method, path: method == "GET" and not is_probe(path))
    trainers = joint.start(SCRIPT, 2, tmp_path, [options] * 2)
    try:
        for trainer in reversed(trainers):
            trainer.end()
    finally:
        for trainer in trainers:
            trainer.kill()
    for trainer in trainers:
        assert trainer.status != 0
        assert "it is not known what can be resumed from: process 0: " in trainer.errors


@gs_only
@pytest.mark.campaign
def test_a_backup_in_a_bucket_is_gone_on_from_and_deleted_when_all_have_ended(
    run: str, tmp_path: Path, elsewhere: Path
) -> None:
    options = {"kind": "model", "saver": "backup", "arguments": {"save_freq": 1}, "backup_dir": run}
    run_until_killed(2, tmp_path, options, 9)
    assert list_objects(run)
    assert_same(joint.run(SCRIPT, 2, tmp_path, **options), 2, "model", elsewhere)
    assert list_objects(run) == []
