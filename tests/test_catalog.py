"""What counts as committed in a directory of steps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorstore as ts

from offstep.catalog import is_committed, latest_step, leftovers, list_steps

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
    assert latest_step(tmp_path / "ckpts") == 1


@pytest.mark.parametrize("size_bytes", [0, 3, 7, 11, 12, -1])
def test_truncated_manifest_is_not_committed(commit: Commit, manifest: bytes, size_bytes: int) -> None:
    checkpoint = commit(1)
    (checkpoint / "pytree" / "manifest.ocdbt").write_bytes(manifest[:size_bytes])
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


def test_leftovers_are_in_progress_names_and_our_trash(tmp_path: Path, commit: Commit) -> None:
    commit(4)
    names = [".offstep-trash-3-ab12", "5.orbax-checkpoint-tmp", "6.orbax-checkpoint-tmp-1700"]
    for name in [*names, "notes.orbax-checkpoint-tmp", "trash", "offstep-trash-1"]:
        (tmp_path / "ckpts" / name).mkdir()
    assert leftovers(tmp_path / "ckpts") == [tmp_path / "ckpts" / name for name in names]


def test_catalog_imports_neither_jax_nor_keras() -> None:
    code = "import sys, offstep.catalog; assert not {'jax', 'keras', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
