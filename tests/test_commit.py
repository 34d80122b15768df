"""The only module that fsyncs, renames and deletes: on real file systems, also full and read-only ones."""

from __future__ import annotations

import errno
import mmap
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from failing_disk import Plan, fail_with, save

from offstep import catalog, disk, recovery
from offstep.commit import (
    StagedDirectory,
    StagedFile,
    make_root,
    probe_directory,
    refuse_foreign,
    remove_directory,
    remove_file,
)
from offstep.temporary_names import FILE_IN_PROGRESS_PREFIX, IN_PROGRESS_MARK, OUR_MARK

MB = 1 << 20
SMALL = {"a": (b"one", b"two"), "pytree/d/b": (b"x" * 5000,), "pytree/empty": ()}


def read_all(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@contextmanager
def mounted_tmpfs(at: Path, options: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    at.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def test_a_committed_directory_has_all_files_and_no_temporary_name_is_left(tmp_path: Path) -> None:
    with StagedDirectory(tmp_path / "5") as staged:
        sizes = staged.write(SMALL)
        staged.write({"pytree/late": (b"l",)})
        staged.commit()
    assert sizes == {"a": 6, "pytree/d/b": 5000, "pytree/empty": 0}
    assert read_all(tmp_path / "5") == {
        "a": b"onetwo",
        "pytree/d/b": b"x" * 5000,
        "pytree/empty": b"",
        "pytree/late": b"l",
    }
    assert os.listdir(tmp_path) == ["5"]


def test_a_staged_directory_is_none_of_the_steps_and_found_as_a_leftover(tmp_path: Path) -> None:
    with StagedDirectory(tmp_path / "5") as staged:
        staged.write({"_CHECKPOINT_METADATA": (b"{}",), "pytree/manifest.ocdbt": (b"m",)})
        assert catalog.list_steps(tmp_path) == []
        assert catalog.leftovers(tmp_path) == [staged.path]


def test_what_is_not_committed_is_deleted(tmp_path: Path) -> None:
    with StagedDirectory(tmp_path / "5") as staged:
        staged.write(SMALL)
    assert os.listdir(tmp_path) == []


def test_an_older_directory_is_replaced_whole(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        with StagedDirectory(tmp_path / "5") as staged:
            staged.write({content.decode(): (content,)})
            staged.commit()
    assert read_all(tmp_path / "5") == {"new": b"new"}
    assert os.listdir(tmp_path) == ["5"]


def test_an_older_directory_stays_when_the_new_one_is_given_up(tmp_path: Path) -> None:
    with StagedDirectory(tmp_path / "5") as staged:
        staged.write({"old": (b"old",)})
        staged.commit()
    with StagedDirectory(tmp_path / "5") as staged:
        staged.write({"new": (b"new",)})
        with pytest.raises(FileExistsError):
            staged.write({"new": (b"again",)})
    assert read_all(tmp_path / "5") == {"old": b"old"}
    assert os.listdir(tmp_path) == ["5"]


def test_what_an_attempt_with_the_same_tag_left_is_deleted_and_others_stay(tmp_path: Path) -> None:
    left, of_another = StagedDirectory(tmp_path / "5", tag="run-1"), StagedDirectory(tmp_path / "5", tag="run-2")
    (left.path / "garbage").write_bytes(b"garbage")
    with StagedDirectory(tmp_path / "5", tag="run-1") as staged:
        staged.write(SMALL)
        staged.commit()
    assert set(os.listdir(tmp_path)) == {"5", of_another.path.name}
    assert "garbage" not in read_all(tmp_path / "5")


def test_what_an_attempt_left_is_deleted_only_after_the_parent_is_fsynced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the fsync after an exchange has failed, that is the older checkpoint, and the only durable one."""
    StagedDirectory(tmp_path / "5", tag="a-1").path.joinpath("old").touch()
    monkeypatch.setattr(disk, "calls", Plan("fsync_parent", fail_with(errno.EIO)).calls())
    with pytest.raises(OSError, match="Input/output error"):
        StagedDirectory(tmp_path / "5", tag="a-1")
    [left] = catalog.leftovers(tmp_path)
    assert os.listdir(left) == ["old"]


@pytest.mark.parametrize("mark", ["offstep.json", "_CHECKPOINT_METADATA", "commit_success.txt", None])
def test_only_checkpoints_and_empty_directories_may_be_replaced(tmp_path: Path, mark: str | None) -> None:
    refuse_foreign(tmp_path / "5")
    (tmp_path / "5").mkdir()
    refuse_foreign(tmp_path / "5")
    (tmp_path / "5/notes").mkdir()
    with pytest.raises(FileExistsError, match="a directory that is no checkpoint has the name of this step"):
        refuse_foreign(tmp_path / "5")
    if mark is not None:
        (tmp_path / "5" / mark).touch()
        refuse_foreign(tmp_path / "5")


def both(content: bytes) -> dict[str, bytes]:
    return {"file": content, "deep/er/file": content}


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_an_older_directory_is_replaced_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """On NFS the second save of a step failed with EINVAL."""
    monkeypatch.setattr(disk, "calls", Plan("exchange", fail_with(code), always=True).calls())
    for content in (b"old", b"new", b"newer"):
        save(tmp_path / "5", content)
        assert read_all(tmp_path / "5") == both(content)
        assert os.listdir(tmp_path) == ["5"]


def test_an_older_directory_gets_its_name_back_when_the_new_one_cannot_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "5", b"old")
    rename = Plan("rename", fail_with(errno.EIO), nth=2).calls().rename
    exchange = Plan("exchange", fail_with(errno.EINVAL)).calls().exchange
    monkeypatch.setattr(disk, "calls", disk.Calls(rename=rename, exchange=exchange))
    with pytest.raises(OSError, match="Input/output error"):
        save(tmp_path / "5", b"new")
    assert read_all(tmp_path / "5") == both(b"old")
    assert os.listdir(tmp_path) == ["5"]


def test_an_exchange_that_fails_for_another_reason_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "5", b"old")
    monkeypatch.setattr(disk, "calls", Plan("exchange", fail_with(errno.EIO)).calls())
    with pytest.raises(OSError, match="Input/output error"):
        save(tmp_path / "5", b"new")
    assert read_all(tmp_path / "5") == both(b"old")
    assert os.listdir(tmp_path) == ["5"]


@pytest.mark.parametrize("point", ["make_directory", "create", "write", "fsync_file", "fsync_directory"])
def test_each_call_before_the_new_name_that_fails_leaves_the_older_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    save(tmp_path / "5", b"old")
    counting = Plan("any", fail_with(errno.EIO), nth=-1)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "calls", counting.calls())
        save(tmp_path / "5", b"old")
    assert counting.counts[point] >= 2
    for nth in range(1, counting.counts[point] + 1):
        with monkeypatch.context() as patch:
            patch.setattr(disk, "calls", Plan(point, fail_with(errno.EIO), nth=nth).calls())
            with pytest.raises(OSError, match="Input/output error"):
                save(tmp_path / "5", b"new")
        assert read_all(tmp_path / "5") == both(b"old")
        assert os.listdir(tmp_path) == ["5"]


def test_a_parent_that_cannot_be_fsynced_is_an_error_and_nothing_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "5", b"old")
    monkeypatch.setattr(disk, "calls", Plan("fsync_parent", fail_with(errno.EIO)).calls())
    with pytest.raises(OSError, match="Input/output error"):
        save(tmp_path / "5", b"new")
    [other] = catalog.leftovers(tmp_path)
    assert [read_all(tmp_path / "5"), read_all(other)] == [both(b"new"), both(b"old")]


KILLED = """
import errno, sys
from dataclasses import replace
from pathlib import Path
from failing_disk import Plan, die, fail_with, save
from offstep import disk
disk.calls = Plan("any", die, nth=int(sys.argv[1])).calls()
if sys.argv[2] == "False":
    disk.calls = replace(disk.calls, exchange=Plan("exchange", fail_with(errno.EINVAL), always=True).calls().exchange)
save(Path(sys.argv[3]), b"new")
"""


@pytest.mark.crash
@pytest.mark.parametrize("can_exchange", [True, False])
def test_killed_at_any_call_the_old_or_the_new_directory_is_there_whole(tmp_path: Path, can_exchange: bool) -> None:
    """Without an exchange there is a moment between two names; recovery gives the old one back."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    contents = []
    for nth in range(1, 100):
        root = tmp_path / str(nth)
        root.mkdir()
        save(root / "5", b"old")
        command = [sys.executable, "-c", KILLED, str(nth), str(can_exchange), str(root / "5")]
        done = subprocess.run(command, env=environment, check=False)
        recovery.recover(root)
        assert os.listdir(root) == ["5"]
        contents.append((root / "5/file").read_bytes())
        assert read_all(root / "5") == both(contents[-1])
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    turned = contents.index(b"new")
    assert 10 < turned < len(contents) - 1
    assert contents == [b"old"] * turned + [b"new"] * (len(contents) - turned)


def test_a_file_in_the_place_of_a_checkpoint_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "5").write_text("mine")
    with pytest.raises(NotADirectoryError, match="a file is where the checkpoint shall go"):
        StagedDirectory(tmp_path / "5")
    assert (tmp_path / "5").read_text() == "mine"
    assert os.listdir(tmp_path) == ["5"]


@pytest.mark.parametrize("is_dangling", [False, True])
def test_a_link_in_the_place_of_a_checkpoint_is_replaced_and_its_target_untouched(
    tmp_path: Path, is_dangling: bool
) -> None:
    elsewhere = tmp_path / "elsewhere"
    if not is_dangling:
        elsewhere.mkdir()
        (elsewhere / "mine").write_text("mine")
    root = tmp_path / "root"
    root.mkdir()
    (root / "5").symlink_to(elsewhere)
    with StagedDirectory(root / "5") as staged:
        staged.write(SMALL)
        staged.commit()
    assert not (root / "5").is_symlink()
    assert set(read_all(root / "5")) == set(SMALL)
    assert os.listdir(root) == ["5"]
    assert is_dangling or (elsewhere / "mine").read_text() == "mine"


def test_a_removed_checkpoint_leaves_its_name_and_no_trash(tmp_path: Path) -> None:
    with StagedDirectory(tmp_path / "5") as staged:
        staged.write(SMALL)
        staged.commit()
    remove_directory(tmp_path / "5")
    assert os.listdir(tmp_path) == []


def test_a_removed_link_leaves_what_it_links_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    (tmp_path / "5").symlink_to(tmp_path / "elsewhere")
    remove_directory(tmp_path / "5")
    assert os.listdir(tmp_path) == ["elsewhere"]
    assert (tmp_path / "elsewhere" / "mine").read_text() == "mine"


@pytest.mark.parametrize("tail_bytes", [0, 1, 4095, 4096, 4097, 100_000])
@pytest.mark.parametrize("where", ["disk", "tmpfs"])
def test_large_parts_are_written_as_they_are(tmp_path: Path, where: str, tail_bytes: int) -> None:
    """Page-aligned memory goes around the page cache where the file system lets it."""
    head = random.Random(0).randbytes(9 * MB + 4096)
    tail = random.Random(1).randbytes(tail_bytes)
    directory = tmp_path if where == "disk" else Path("/dev/shm") / tmp_path.name
    directory.mkdir(exist_ok=True)
    try:
        with mmap.mmap(-1, len(head)) as slot:
            slot[:] = head
            with memoryview(slot) as view, StagedDirectory(directory / "5") as staged:
                staged.write({"d/data": (view, tail[:1], tail[1:])}, io_threads=2)
                staged.commit()
        assert (directory / "5/d/data").read_bytes() == head + tail
    finally:
        if where == "tmpfs":
            shutil.rmtree(directory)


@pytest.mark.parametrize("offset", [0, 1, 4096])
def test_large_parts_that_are_no_whole_memory_map_are_written_as_they_are(tmp_path: Path, offset: int) -> None:
    """Direct I/O refused a document whose size happened to be whole pages: its memory was not aligned."""
    content = random.Random(0).randbytes(2 * MB)
    with StagedDirectory(tmp_path / "5") as staged:
        staged.write({"data": (memoryview(content)[offset : offset + MB], b"tail"), "bytes": (content,)})
        staged.commit()
    assert (tmp_path / "5/data").read_bytes() == content[offset : offset + MB] + b"tail"
    assert (tmp_path / "5/bytes").read_bytes() == content


def test_memory_that_ends_within_a_page_is_written_as_it_is(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(3 * MB + 17)
    with StagedDirectory(tmp_path / "5") as staged:
        staged.write({"data": (content, b"tail")})
        staged.commit()
    assert (tmp_path / "5/data").read_bytes() == content + b"tail"


@pytest.mark.parametrize("part_bytes", [4 * MB, 4 * MB + 5])
def test_a_full_disk_is_an_error_and_leaves_what_was_there(tmp_path: Path, part_bytes: int) -> None:
    with mounted_tmpfs(tmp_path / "small", "size=3m") as disk:
        with StagedDirectory(disk / "1") as staged:
            staged.write({"data": (b"x" * 500_000,)})
            staged.commit()
        with mmap.mmap(-1, part_bytes) as slot, memoryview(slot) as view:
            with (
                pytest.raises(OSError, match="No space left on device") as raised,
                StagedDirectory(disk / "2") as staged,
            ):
                staged.write({"data": (view,)})
            assert raised.value.errno == errno.ENOSPC
            del raised
        assert os.listdir(disk) == ["1"]
        assert read_all(disk / "1") == {"data": b"x" * 500_000}
        with StagedDirectory(disk / "3") as staged:  # there is room again
            staged.write({"data": (b"x" * 2_000_000,)})
            staged.commit()


def test_a_directory_that_cannot_be_written_to_is_told_by_its_name(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "ro", "size=1m,ro") as disk:
        with pytest.raises(OSError, match="checkpoints cannot be saved here: Read-only file system") as raised:
            probe_directory(disk / "run")
        assert raised.value.filename == str(disk / "run")
        assert raised.value.errno == errno.EROFS


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_told_by_its_name(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="checkpoints cannot be saved here: Permission denied"):
        probe_directory(tmp_path)


@pytest.mark.parametrize("below", [".", "run", "run/deep"])
def test_a_file_in_the_place_of_the_root_is_told_by_its_name(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"checkpoints cannot be saved here: .*(file|directory)"):
        probe_directory(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_probe_makes_the_directory_and_nothing_in_it(tmp_path: Path) -> None:
    probe_directory(tmp_path / "run/deep")
    assert os.listdir(tmp_path / "run/deep") == []


def test_a_link_planted_at_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    elsewhere.mkdir()
    root.mkdir()
    (root / f"5{OUR_MARK}run-1").symlink_to(elsewhere)
    with StagedDirectory(root / "5", tag="run-1") as staged:
        staged.write(SMALL)
        staged.commit()
    assert os.listdir(elsewhere) == []
    assert os.listdir(root) == ["5"]


@pytest.mark.parametrize("name", ["link", "link/file", "deep/link", "deep/link/file"])
def test_a_link_planted_inside_the_staged_directory_is_not_followed(tmp_path: Path, name: str) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    elsewhere.mkdir()
    root.mkdir()
    with StagedDirectory(root / "5") as staged:
        staged.write({"deep/file": (b"x",)})
        planted = staged.path / name.removesuffix("/file")
        planted.symlink_to(elsewhere / "mine")
        with pytest.raises(FileExistsError):
            staged.write({name: (b"x",)})
    assert os.listdir(elsewhere) == []


def test_a_parent_exchanged_for_a_link_in_the_middle_of_a_save_redirects_nothing(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    elsewhere.mkdir()
    root.mkdir()
    with StagedDirectory(root / "5") as staged:
        root.rename(tmp_path / "moved")
        root.symlink_to(elsewhere)
        staged.write(SMALL)
        staged.commit()
    assert os.listdir(elsewhere) == []
    assert set(read_all(tmp_path / "moved/5")) == set(SMALL)


def test_a_private_checkpoint_is_for_its_owner_only(tmp_path: Path) -> None:
    with StagedDirectory(tmp_path / "5", private=True) as staged:
        staged.write(SMALL | {"large": (bytes(MB),)})
        staged.commit()
    for path in [tmp_path / "5", *(tmp_path / "5").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_a_root_behind_a_link_is_used(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    make_root(tmp_path / "link/run")
    with StagedDirectory(tmp_path / "link/run/5") as staged:
        staged.write(SMALL)
        staged.commit()
    assert os.listdir(tmp_path / "real/run") == ["5"]


def test_a_root_behind_a_dangling_link_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="checkpoints cannot be saved here"):
        probe_directory(tmp_path / "link/run")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with StagedDirectory(tmp_path / "5") as staged:
            staged.write(SMALL | {"large": (bytes(MB),)})
            staged.commit()
    finally:
        os.umask(before)
    for path in [tmp_path / "5", *(tmp_path / "5").rglob("*")]:
        most = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == most & ~umask


SAVE_ONCE = """
import sys, jax.numpy as jnp, offstep
with offstep.Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(7, {"large": jnp.ones((1000, 1000)), "small": jnp.ones(3)})
"""


def test_everything_is_fsynced_before_the_rename_and_the_parent_before_the_trainer_is_told(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log, root = tmp_path / "log", tmp_path / "run"
    root.mkdir()
    calls = "trace=fsync,fdatasync,rename,renameat,renameat2,sendto,sendmsg"
    command = [
        "strace",
        "-f",
        "-y",
        "-s",
        "200",
        "-e",
        calls,
        "-o",
        str(log),
        sys.executable,
        "-c",
        SAVE_ONCE,
        str(root),
    ]
    traced = subprocess.run(command, capture_output=True, text=True, check=False)
    if "ptrace" in traced.stderr:
        pytest.skip(f"strace may not trace here: {traced.stderr}")
    assert traced.returncode == 0, traced.stderr
    events = list(read_events(log.read_text().splitlines()))
    renamed = next(i for i, (call, text) in enumerate(events) if call.startswith("rename") and IN_PROGRESS_MARK in text)
    staged = re.search(rf'"([^"]*{IN_PROGRESS_MARK}[^"]*)"', events[renamed][1])
    assert staged is not None
    temporary = root / staged[1]  # names are relative to the descriptor of the root
    before = {path for call, path in events[:renamed] if call == "fsync"}
    checkpoint = root / "7"
    expected = [checkpoint, *checkpoint.rglob("*")]
    assert len(expected) > 10
    assert {str(path).replace(str(checkpoint), str(temporary), 1) for path in expected} <= before
    told = next(i for i, (call, text) in enumerate(events) if call == "sendto" and "durable_at" in text)
    assert ("fsync", str(root)) in events[renamed:told]


def read_events(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yields fsyncs and renames when they have returned, and messages when they are begun, in their order."""
    unfinished: dict[str, str] = {}
    for line in lines:
        pid, text = line.split(maxsplit=1)
        if text.startswith("send"):
            yield text.split("(")[0], text
            continue
        if text.endswith("<unfinished ...>"):
            unfinished[pid] = text
            continue
        if text.startswith("<... "):
            text = unfinished.pop(pid, "") + text
        if not text.rstrip().endswith("= 0"):
            continue
        if text.startswith("fsync("):
            yield "fsync", text[text.index("<") + 1 : text.index(">")]
        elif text.startswith("rename"):
            yield text.split("(")[0], text


def test_the_temporary_name_is_the_one_that_orbax_skips() -> None:
    from orbax.checkpoint._src.path import atomicity_types

    assert IN_PROGRESS_MARK == atomicity_types.TMP_DIR_SUFFIX


# ---------------------------------------------------------------------------------------------------- single files


def stage(final: Path, pieces: list[tuple[bytes | memoryview, int]], size_bytes: int) -> None:
    with StagedFile(final, size_bytes=size_bytes, tag="t") as staged:
        for content, offset in pieces:
            staged.write(content, offset)
        staged.commit()


@pytest.mark.parametrize("body_bytes", [4096, 2 * MB], ids=["small", "large"])
def test_a_committed_file_has_all_pieces_and_its_size(tmp_path: Path, body_bytes: int) -> None:
    head, tail = b"h" * 8192, b"tail"
    with mmap.mmap(-1, body_bytes) as body:
        body[:] = bytes(random.Random(1).randbytes(body_bytes))
        expected = head + body[:] + tail
        with memoryview(body) as view:
            stage(tmp_path / "a", [(head, 0), (view, len(head)), (tail, len(head) + body_bytes)], len(expected))
    assert (tmp_path / "a").read_bytes() == expected
    assert os.listdir(tmp_path) == ["a"]


def test_what_lies_behind_the_size_of_a_file_is_cut_off(tmp_path: Path) -> None:
    with mmap.mmap(-1, 2 * MB) as body, memoryview(body) as view:
        stage(tmp_path / "a", [(view, 0), (b"tail", MB)], MB + 4)
    assert (tmp_path / "a").read_bytes() == bytes(MB) + b"tail"


def test_an_older_file_stays_until_the_new_one_is_committed(tmp_path: Path) -> None:
    stage(tmp_path / "a", [(b"old", 0)], 3)
    with StagedFile(tmp_path / "a", size_bytes=3) as staged:
        staged.write(b"new", 0)
        assert (tmp_path / "a").read_bytes() == b"old"
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
    stage(tmp_path / "a", [(b"new", 0)], 3)
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_second_attempt_of_a_file_replaces_what_the_first_left(tmp_path: Path) -> None:
    (tmp_path / f"{FILE_IN_PROGRESS_PREFIX}t").write_bytes(b"half of it" * 1000)
    stage(tmp_path / "a", [(b"new", 0)], 3)
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_directory_in_the_place_of_a_file_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError, match="a directory is where the file shall go"):
        StagedFile(tmp_path / "a", size_bytes=1)
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_in_the_place_of_a_file_is_replaced_and_its_target_untouched(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "a").symlink_to("other")
    stage(tmp_path / "a", [(b"new", 0)], 3)
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "other").read_bytes() == b"other"


def test_a_file_on_a_full_disk_fails_and_the_older_one_stays(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "small", "size=3m") as small:
        stage(small / "a", [(b"old", 0)], 3)
        with (
            mmap.mmap(-1, 4 * MB) as body,
            memoryview(body) as view,
            pytest.raises(OSError, match="No space") as caught,
        ):
            stage(small / "a", [(view, 0)], 4 * MB)
        assert caught.value.errno == errno.ENOSPC
        assert os.listdir(small) == ["a"]
        assert (small / "a").read_bytes() == b"old"


def test_a_removed_file_is_gone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    remove_file(tmp_path / "a")
    remove_file(tmp_path / "a")
    assert os.listdir(tmp_path) == []
