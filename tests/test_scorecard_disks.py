"""The scorecard's disks: what is durable survives them, and a commit that leaves something out does not."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import failing_disk
import pytest

import offstep.disk
from offstep import commit

pytestmark = pytest.mark.crash

DISKS = pytest.mark.parametrize("disk", ["ext4", "xfs"])
RUN = Path(__file__).parents[1] / "benchmarks" / "scorecard" / "run.py"


def keep_score(directory: Path, scenario: str, peer: str, *options: str, trials: int = 1) -> dict[str, Any]:
    """Runs a scenario and returns its tally; skips the test where the scenario says that it cannot run."""
    command = [sys.executable, str(RUN), "--quick", "--dir", str(directory), "--trials", str(trials)]
    command += ["--scenarios", scenario, "--peers", peer, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    results = list(directory.glob("*scorecard*.json"))
    assert len(results) == 1, done.stdout + done.stderr
    tally: dict[str, Any] = json.loads(results[0].read_text())["scenarios"][scenario]["peers"][peer]
    assert not [name for name in os.listdir(directory) if name.startswith("scorecard-")], "something is left"
    if tally["skipped"]:
        pytest.skip(tally["skipped"])
    assert tally["trials"] >= trials, tally
    assert (done.returncode == 0) == (tally["survived"] == tally["trials"]), done.stdout + done.stderr
    return tally


def test_without_fsync_a_power_cut_takes_what_was_said_to_be_durable(tmp_path: Path) -> None:
    tally = keep_score(tmp_path, "power_cut_ext4_after_durable", "offstep_weights", "--sabotage", "no_fsync")
    assert (tally["survived"], tally["lost_bytes"] > 0) == (0, True), json.dumps(tally)


@DISKS
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_nothing_is_durable_on_a_disk_that_was_lost_before_its_name_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str, kind: str
) -> None:
    """XFS that has shut down lets the fsync of a directory succeed."""
    monkeypatch.syspath_prepend(str(RUN.parent))
    import disks

    if reason := disks.why_not_here(disk):
        pytest.skip(reason)
    with disks.mounted(disk, tmp_path) as mounted:

        def rename_and_lose(old: str, new: str, directory: int) -> None:
            os.rename(old, new, src_dir_fd=directory, dst_dir_fd=directory)
            mounted.cut_power()

        monkeypatch.setattr(offstep.disk, "calls", replace(offstep.disk.calls, rename=rename_and_lose))
        with pytest.raises(OSError, match="Input/output error"):
            save(kind, mounted.path / "1")
        mounted.power_on()
        assert "1" not in os.listdir(mounted.path)


def save(kind: str, final: Path) -> None:
    if kind == "directory":
        failing_disk.save(final, b"content")
        return
    with commit.StagedFile(final, size_bytes=7) as staged:
        staged.write(b"content", 0)
        staged.commit()


@pytest.mark.campaign
def test_nothing_stays_mounted_however_often_the_run_is_told_to_end(tmp_path: Path) -> None:
    command = [sys.executable, str(RUN), "--quick", "--dir", str(tmp_path), "--peers", "offstep"]
    with Path("/proc/self/mounts").open() as mounts:
        run = subprocess.Popen([*command, "--scenarios", "power_cut_ext4_after_durable", "hung_disk"])
        changes = select.poll()
        changes.register(mounts, select.POLLPRI)
        while str(tmp_path) not in Path("/proc/mounts").read_text():
            changes.poll(100)  # or it has ended: it may not run here
            if run.poll() is not None:
                pytest.skip("it ended without a mount")
    numbers = itertools.cycle((signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    while run.poll() is None:
        run.send_signal(next(numbers))
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(0.05)
    assert run.returncode == 128 + signal.SIGTERM
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    loops = [path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
    assert not [image for image in loops if str(tmp_path) in image]
    assert os.listdir(tmp_path) == []


OURS = pytest.mark.parametrize("peer", ["offstep", "offstep_keras", "offstep_weights", "offstep_tree"])


@pytest.mark.campaign
@pytest.mark.timeout(600)
@OURS
@DISKS
@pytest.mark.parametrize("moment", ["after_durable", "after_fsync", "at_random"])
def test_a_power_cut_takes_nothing_that_was_durable(tmp_path: Path, disk: str, moment: str, peer: str) -> None:
    tally = keep_score(tmp_path, f"power_cut_{disk}_{moment}", peer, trials=3)
    assert tally["survived"] == tally["trials"], tally


@pytest.mark.campaign
@pytest.mark.timeout(600)
@OURS
@DISKS
@pytest.mark.parametrize(
    "how", [["--wrapper", "eatmydata"], ["--sabotage", "no_fsync"], ["--sabotage", "no_directory_fsync"]], ids=" ".join
)
def test_a_commit_that_leaves_fsyncs_out_loses_something_in_a_power_cut(
    tmp_path: Path, how: list[str], disk: str, peer: str
) -> None:
    if shutil.which(how[1]) is None and how[0] == "--wrapper":
        pytest.skip(f"{how[1]} is not installed")
    tally = keep_score(tmp_path, f"power_cut_{disk}_after_durable", peer, *how, trials=5)
    assert tally["survived"] < tally["trials"], tally
    assert tally["lost_bytes"] > 0


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scenario", ["failing_calls_eio", "disk_full_middle", "disk_full_last"])
def test_writing_in_place_loses_the_file_when_the_disk_fails(tmp_path: Path, scenario: str) -> None:
    tally = keep_score(tmp_path, scenario, "offstep_weights", "--sabotage", "in_place", trials=3)
    assert tally["survived"] < tally["trials"], tally
    assert tally["lost_bytes"] > 0


@pytest.mark.campaign
@pytest.mark.timeout(600)
@OURS
@pytest.mark.parametrize(
    "scenario",
    ["disk_full_middle", "disk_full_last", "inodes_exhausted", "read_only", "directory_deleted", "planted_links"],
)
def test_nothing_that_was_durable_is_lost_in_trouble_and_the_rest_is_told(
    tmp_path: Path, scenario: str, peer: str
) -> None:
    tally = keep_score(tmp_path, scenario, peer, trials=3)
    assert tally["survived"] == tally["trials"], tally


@pytest.mark.campaign
@pytest.mark.timeout(600)
@OURS
@pytest.mark.parametrize("scenario", ["flipped_bit_verify", "cut_short_verify"])
def test_damage_is_found_by_verify_or_does_no_harm(tmp_path: Path, scenario: str, peer: str) -> None:
    tally = keep_score(tmp_path, scenario, peer, trials=200)
    assert tally["survived"] == tally["trials"], tally
