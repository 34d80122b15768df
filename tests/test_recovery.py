"""What dead runs left behind is put back or swept, and nothing else is touched."""

from __future__ import annotations

import os
from pathlib import Path

from offstep.recovery import put_back_replaced, recover


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
