"""What dead runs left behind is put back or swept, and nothing else is touched."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
from failing_disk import Plan, fail_with

from offstep import disk, ownership
from offstep.recovery import hold, put_back_replaced, recover

LEFTOVER = "6.orbax-checkpoint-tmp-offstep-0a1b2c3d-1"


def make(path: Path, content: str) -> None:
    path.mkdir()
    (path / "file").write_text(content)


def test_a_checkpoint_that_made_room_for_nothing_gets_its_name_back(tmp_path: Path) -> None:
    make(tmp_path / ".offstep-replaced-5-0a1b2c3d", "old")
    make(tmp_path / "5.orbax-checkpoint-tmp-offstep-0a1b2c3d-7", "new, but never committed")
    recover(tmp_path)
    assert os.listdir(tmp_path) == ["5"]
    assert (tmp_path / "5/file").read_text() == "old"


def test_a_checkpoint_that_was_replaced_is_deleted(tmp_path: Path) -> None:
    make(tmp_path / ".offstep-replaced-5-0a1b2c3d", "old")
    make(tmp_path / "5", "new")
    put_back_replaced(tmp_path)
    assert os.listdir(tmp_path) == ["5"]
    assert (tmp_path / "5/file").read_text() == "new"


def test_only_ours_is_swept(tmp_path: Path) -> None:
    others = ["5", "5.orbax-checkpoint-tmp", "5.orbax-checkpoint-tmp-17", ".offstep-notes", "notes"]
    ours = [".offstep-trash-3-0a1b2c3d", "6.orbax-checkpoint-tmp-offstep-0a1b2c3d-1"]
    for name in others + ours:
        make(tmp_path / name, name)
    recover(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_swept_links_leave_what_they_link_to(tmp_path: Path) -> None:
    make(tmp_path / "mine", "mine")
    (tmp_path / ".offstep-trash-3-0a1b2c3d").symlink_to(tmp_path / "mine")
    recover(tmp_path)
    assert os.listdir(tmp_path) == ["mine"]
    assert (tmp_path / "mine/file").read_text() == "mine"


def test_no_root_is_nothing_to_recover(tmp_path: Path) -> None:
    recover(tmp_path / "none")
    assert os.listdir(tmp_path) == []


def test_a_leftover_is_renamed_before_it_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A live writer that renamed what was being deleted would commit a torn checkpoint."""
    make(tmp_path / LEFTOVER, "new")
    with monkeypatch.context() as patch:
        patch.setattr(disk, "calls", Plan("delete", fail_with(errno.EIO)).calls())
        with pytest.raises(OSError, match="Input/output error"):
            recover(tmp_path)
    [left] = os.listdir(tmp_path)
    assert left.startswith(f".offstep-trash-{LEFTOVER}-")
    recover(tmp_path)
    assert os.listdir(tmp_path) == []


def test_nothing_is_swept_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    make(tmp_path / LEFTOVER, "of a live run")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(RuntimeWarning, match="this file system has no locks"):
        lock = hold(ownership.lock_path(tmp_path), takeover=False)
    try:
        assert not ownership.is_alone(tmp_path)
        assert (tmp_path / LEFTOVER / "file").exists()
    finally:
        ownership.release(lock)


def test_what_cannot_be_swept_is_warned_of_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / LEFTOVER, "of another user")
    with monkeypatch.context() as patch:
        patch.setattr(disk, "calls", Plan("rename", fail_with(errno.EACCES)).calls())
        with pytest.warns(RuntimeWarning, match="could not be swept: .*Permission denied"):
            lock = hold(ownership.lock_path(tmp_path), takeover=False)
    ownership.release(lock)
    assert os.listdir(tmp_path) == [LEFTOVER]


def test_where_a_lock_file_cannot_be_opened_somebody_may_be(tmp_path: Path) -> None:
    (tmp_path / ".offstep-lock-0a1b2c3d").symlink_to(tmp_path / "elsewhere")
    assert not ownership.is_alone(tmp_path)
