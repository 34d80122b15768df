"""What counts as committed in a directory of steps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorstore as ts

from offstep.catalog import is_committed, latest_step, leftovers, list_steps, replaced
from offstep.manifest import FileRecord, build

Commit = Callable[[object], Path]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    base = tmp_path_factory.mktemp("ocdbt")
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{base}/"}).result()
    store.write("key", b"value").result()
    return (base / "manifest.ocdbt").read_bytes()


@pytest.fixture
def commit(tmp_path: Path, manifest: bytes) -> Commit:
    def commit(name: object) -> Path:
        checkpoint = tmp_path / "ckpts" / str(name)
        (checkpoint / "pytree").mkdir(parents=True)
        (checkpoint / "_CHECKPOINT_METADATA").write_text("{}")
        (checkpoint / "pytree" / "manifest.ocdbt").write_bytes(manifest)
        return checkpoint

    return commit


def test_missing_root_is_empty(tmp_path: Path) -> None:
    root = tmp_path / "none"
    assert (list_steps(root), latest_step(root), leftovers(root)) == ([], None, [])


def test_empty_root_is_empty(tmp_path: Path) -> None:
    assert (list_steps(tmp_path), latest_step(tmp_path), leftovers(tmp_path)) == ([], None, [])


def test_steps_are_ordered_by_number(tmp_path: Path, commit: Commit) -> None:
    for step in (10, 9, 100, 0):
        commit(step)
    assert list_steps(tmp_path / "ckpts") == [0, 9, 10, 100]
    assert latest_step(str(tmp_path / "ckpts")) == 100


@pytest.mark.parametrize(
    "name", ["007", "-1", "1e3", "٣", "step_5", "5.orbax-checkpoint-tmp", "5.orbax-checkpoint-tmp-17", "5\n"]
)
def test_other_names_are_no_steps(tmp_path: Path, commit: Commit, name: str) -> None:
    commit(name)
    assert list_steps(tmp_path / "ckpts") == []
    assert latest_step(tmp_path / "ckpts") is None


@pytest.mark.parametrize("marker", ["_CHECKPOINT_METADATA", "pytree/manifest.ocdbt"])
def test_step_without_a_marker_is_not_committed(tmp_path: Path, commit: Commit, marker: str) -> None:
    commit(1)
    (commit(2) / marker).unlink()
    assert list_steps(tmp_path / "ckpts") == [1]
    with pytest.warns(RuntimeWarning, match=rf"ckpts/2 is no whole checkpoint and is passed over: {marker} is missing"):
        assert latest_step(tmp_path / "ckpts") == 1


@pytest.mark.parametrize("size_bytes", [0, 3, 7, 11, 12, -1])
def test_truncated_manifest_is_not_committed(commit: Commit, manifest: bytes, size_bytes: int) -> None:
    checkpoint = commit(1)
    (checkpoint / "pytree" / "manifest.ocdbt").write_bytes(manifest[:size_bytes])
    assert not is_committed(checkpoint)


def record(checkpoint: Path, **sizes: int) -> None:
    records = {name: FileRecord(size) for name, size in sizes.items()}
    (checkpoint / "offstep.json").write_bytes(build({"step": 1}, records, 0))


def test_a_newest_step_with_a_file_cut_short_or_missing_is_passed_over_and_named(
    tmp_path: Path, commit: Commit
) -> None:
    for step, content in [(1, b"whole"), (2, b"cut"), (3, None)]:
        checkpoint = commit(step)
        record(checkpoint, data=5)
        if content is not None:
            (checkpoint / "data").write_bytes(content)
    assert list_steps(tmp_path / "ckpts") == [1]
    with pytest.warns(RuntimeWarning) as warned:
        assert latest_step(tmp_path / "ckpts") == 1
    faults = ["data is missing", "data has 3 bytes, expected 5"]
    assert [str(warning.message).partition("passed over: ")[2] for warning in warned] == faults


def test_a_step_with_a_damaged_manifest_of_ours_is_not_committed(commit: Commit) -> None:
    checkpoint = commit(1)
    record(checkpoint)
    assert is_committed(checkpoint)
    text = (checkpoint / "offstep.json").read_bytes()
    (checkpoint / "offstep.json").write_bytes(text.replace(b"1", b"2", 1))
    assert not is_committed(checkpoint)


def test_foreign_manifest_is_not_committed(commit: Commit, manifest: bytes) -> None:
    checkpoint = commit(1)
    (checkpoint / "pytree" / "manifest.ocdbt").write_bytes(b"x" * len(manifest))
    assert not is_committed(checkpoint)


def test_file_or_directory_in_place_of_something_is_not_committed(tmp_path: Path, commit: Commit) -> None:
    (commit(1) / "pytree" / "manifest.ocdbt").unlink()
    (tmp_path / "ckpts" / "1" / "pytree" / "manifest.ocdbt").mkdir()
    (tmp_path / "ckpts" / "2").write_text("a file")
    assert list_steps(tmp_path / "ckpts") == []


def test_root_may_be_a_link(tmp_path: Path, commit: Commit) -> None:
    commit(3)
    (tmp_path / "link").symlink_to(tmp_path / "ckpts")
    assert list_steps(tmp_path / "link") == [3]
    assert latest_step(tmp_path / "link") == 3


def test_root_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        list_steps(tmp_path / "file")


def test_leftovers_are_what_we_have_in_progress_and_our_trash(tmp_path: Path, commit: Commit) -> None:
    commit(4)
    ours = [".offstep-trash-3-ab12", "6.orbax-checkpoint-tmp-offstep-0a1b2c3d-7"]
    others = ["5.orbax-checkpoint-tmp", "6.orbax-checkpoint-tmp-1700", "notes.orbax-checkpoint-tmp-offstep-0a-7"]
    for name in [*ours, *others, "trash", "offstep-trash-1"]:
        (tmp_path / "ckpts" / name).mkdir()
    assert leftovers(tmp_path / "ckpts") == [tmp_path / "ckpts" / name for name in ours]


def test_what_made_room_for_another_is_known_by_the_name_that_it_had(tmp_path: Path) -> None:
    for name in (".offstep-replaced-12-0a1b2c3d", ".offstep-replaced-notes-0a", ".offstep-replaced-12"):
        (tmp_path / name).mkdir()
    assert replaced(tmp_path) == {tmp_path / ".offstep-replaced-12-0a1b2c3d": tmp_path / "12"}


def test_catalog_imports_neither_jax_nor_keras() -> None:
    code = "import sys, offstep.catalog; assert not {'jax', 'keras'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
