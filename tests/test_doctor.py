"""What `offstep doctor` measures and says."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import offstep

from offstep.doctor import find_file_system

MOUNTS = "/dev/sda / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\nhost:/x /data\\040sets nfs4 rw 0 0\n"


def test_it_measures_and_leaves_nothing(tmp_path: Path) -> None:
    run = offstep("doctor", tmp_path, "--json")
    assert (run.code, run.err) == (0, "")
    found = run.document
    assert all(found[name] > 0 for name in ("copy_speed", "write_speed", "sync_seconds", "free_bytes", "memory_bytes"))
    assert (found["fetch_speed"], found["devices"][0][:4]) == (None, "cpu:")
    assert "A state of 1 GB would stall training for about" in found["advice"][0]
    assert "holds 2 snapshots of a state of up to" in found["advice"][1]
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = offstep("doctor", tmp_path / "file")
    assert run.code == 6
    assert run.err == f"offstep: doctor needs a directory that exists: {tmp_path}/file\n"
    assert offstep("doctor", tmp_path / "absent").code == 6
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("path", "kind"), [("/home/me", "ext4"), ("/tmp/run", "tmpfs"), ("/tmpx", "ext4"), ("/data sets/a", "nfs4")]
)
def test_the_longest_mount_point_counts(path: str, kind: str) -> None:
    assert find_file_system(Path(path), MOUNTS) == kind
