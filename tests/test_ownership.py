"""One live run on one target: the lock, whom it keeps out, and how long it lasts."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
import keras
import numpy as np
import orbax.checkpoint as ocp
import pytest
from failing_disk import Plan, fail_with
from interpreters import Interpreter
from orbax.checkpoint import v1
from processes import find_writers, wait_for_end
from runs import fit, make_model

import offstep
from offstep import disk, ownership
from offstep.errors import SaveFailed, TargetInUse

TREE = {"w": jnp.arange(3.0)}
OTHER = """
import os, sys, jax.numpy as jnp, offstep
checkpointer = offstep.Checkpointer(sys.argv[1])
checkpointer.save(1, {"w": jnp.arange(3.0)}).wait()
print("saved", flush=True)
sys.stdin.readline()
checkpointer.save(2, {"w": jnp.arange(3.0)})
try:
    checkpointer.wait()
except offstep.SaveFailed as error:
    print(error, flush=True)
checkpointer.close()
"""


@contextmanager
def another_run(directory: Path) -> Iterator[Interpreter]:
    with Interpreter(["-c", OTHER, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "saved\n"
        try:
            yield other
        finally:
            other.kill()


def finish(other: Interpreter) -> str:
    return other.communicate("go\n", timeout=60)[0]


def list_locks(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".offstep")]


def test_a_second_live_run_is_refused_with_the_process_and_host_of_the_first(tmp_path: Path) -> None:
    with another_run(tmp_path) as other, offstep.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.all_steps() == [1]  # reading is for everybody
        who = rf"another run saves to {tmp_path} \(process {other.pid} on {os.uname().nodename}, since 20"
        with pytest.raises(TargetInUse, match=who):
            checkpointer.save(3, TREE)
        with pytest.raises(TargetInUse, match="pass takeover=True"):
            fit(make_model(), [offstep.ModelCheckpoint(tmp_path / "{step}")])
        assert finish(other) == ""
        checkpointer.save(3, TREE)
        checkpointer.wait()
        assert checkpointer.all_steps() == [1, 2, 3]
    assert list_locks(tmp_path) == []


def test_a_run_that_is_taken_over_fails_from_then_on(tmp_path: Path) -> None:
    with another_run(tmp_path) as other, offstep.Checkpointer(tmp_path, takeover=True) as checkpointer:
        checkpointer.save(3, TREE)
        checkpointer.wait()
        assert "another run has taken over" in finish(other)
        assert len(list_locks(tmp_path)) == 1  # the other took only its own away
        assert checkpointer.all_steps() == [1, 3]
    assert list_locks(tmp_path) == []


def test_a_run_that_was_taken_over_stays_so_when_its_successor_has_ended(tmp_path: Path) -> None:
    with another_run(tmp_path) as other:
        with offstep.Checkpointer(tmp_path, takeover=True) as checkpointer:
            checkpointer.save(3, TREE)
            checkpointer.wait()
        assert list_locks(tmp_path) == []
        assert "another run has taken over" in finish(other)
        assert checkpointer.all_steps() == [1, 3]


FORK = """
import os, sys
from pathlib import Path
from offstep import ownership

path = ownership.lock_path(Path(sys.argv[1]))
held = ownership.acquire(path)
(heard, tell), (go, let) = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    lock = ownership.acquire(path)
    assert lock.is_parents
    ownership.release(lock)
    os.write(tell, b".")
    os.read(go, 1)
    assert not ownership.acquire(path).is_parents
    os._exit(0)
os.close(tell)
os.read(heard, 1)
ownership.release(held)
path.write_text('{"pid": 1}')
os.write(let, b".")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_joins_its_parent_and_not_who_came_after_it(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.stderr, ended.returncode) == ("", 0)


def test_a_run_after_a_killed_one_waits_for_its_writer(tmp_path: Path) -> None:
    with another_run(tmp_path) as other:
        [writer] = find_writers(other.pid)
        writer.send_signal(signal.SIGSTOP)
        other.kill()
        other.wait()
        [name] = list_locks(tmp_path)
        descriptor = os.open(tmp_path / name, os.O_RDWR)
        try:
            assert not ownership._try_lock(tmp_path / name, descriptor)  # the writer has it still
        finally:
            os.close(descriptor)
        writer.send_signal(signal.SIGCONT)
        with offstep.Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(3, TREE)
            checkpointer.wait()
        wait_for_end(writer.pid)
    assert list_locks(tmp_path) == []


def test_callbacks_of_one_process_share_a_folder(tmp_path: Path) -> None:
    callbacks = [
        offstep.ModelCheckpoint(tmp_path / "{step}"),
        offstep.ModelCheckpoint(tmp_path / "{step}", save_freq=3),
        offstep.ModelCheckpoint(tmp_path / "best.keras", monitor="loss", save_best_only=True),
        offstep.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True),
    ]
    fit(make_model(), callbacks)
    assert {"best.keras", "1.weights.h5", "2.weights.h5", "3", "7", "14"} <= set(os.listdir(tmp_path))
    assert list_locks(tmp_path) == []


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_callbacks_that_keep_different_steps_in_one_directory_are_warned_of_once(tmp_path: Path) -> None:
    callbacks = [
        offstep.ModelCheckpoint(tmp_path / "{step}", max_to_keep=1),
        offstep.ModelCheckpoint(tmp_path / "{step}", save_freq=3),
        offstep.ModelCheckpoint(tmp_path / "{step}", save_weights_only=True, save_freq=100),
    ]
    with pytest.warns(UserWarning, match="is shared by two that differ in max_to_keep") as told:
        fit(make_model(), callbacks)
    assert len([warning for warning in told if "is shared by" in str(warning.message)]) == 1


def test_a_path_for_one_step_and_one_for_many_cannot_share_a_directory(tmp_path: Path) -> None:
    with offstep.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, TREE)
        with pytest.raises(ValueError, match=rf"deletes all other steps\. Received: {tmp_path} for both"):
            fit(make_model(), [offstep.ModelCheckpoint(tmp_path)])
        checkpointer.wait()
        assert checkpointer.all_steps() == [1]
    assert list_locks(tmp_path) == []


def test_files_of_another_name_in_the_same_folder_are_another_target(tmp_path: Path) -> None:
    folder = tmp_path.resolve()
    held = ownership.acquire(ownership.lock_path(folder, "a.keras"))
    try:
        assert ownership.lock_path(folder, "b.keras") != held.path
        assert ownership.is_alone(folder, held.path)
        assert not ownership.is_alone(folder)
    finally:
        ownership.release(held)


def test_stock_readers_ignore_the_lock(tmp_path: Path) -> None:
    model = make_model()
    fit(model, [offstep.ModelCheckpoint(tmp_path / "{step}")])
    held = ownership.acquire(ownership.lock_path(tmp_path))
    try:
        loaded = keras.saving.load_model(tmp_path)
        with ocp.CheckpointManager(tmp_path) as manager:
            assert manager.all_steps() == [7, 14]
            manager.restore(14, args=ocp.args.Composite(pytree=ocp.args.StandardRestore()))
        with v1.training.Checkpointer(tmp_path) as checkpointer:
            assert [checkpoint.step for checkpoint in checkpointer.checkpoints] == [7, 14]
    finally:
        ownership.release(held)
    np.testing.assert_array_equal(loaded.get_weights()[0], model.get_weights()[0])


def test_what_dead_runs_left_is_swept_at_the_start(tmp_path: Path) -> None:
    for name in ("5.orbax-checkpoint-tmp-offstep-0a1b2c3d-7", ".offstep-trash-3-0a1b2c3d"):
        (tmp_path / name).mkdir()
    (tmp_path / ".offstep-tmp-0a1b2c3d-7").touch()
    (tmp_path / ".offstep-lock").touch()  # as a power cut leaves it
    with offstep.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, TREE)
        checkpointer.wait()
    assert os.listdir(tmp_path) == ["1"]


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_leftovers_that_cannot_be_swept_are_a_warning_and_fail_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover = "5.orbax-checkpoint-tmp-offstep-0a1b2c3d-7"
    (tmp_path / "1" / leftover).mkdir(parents=True)
    monkeypatch.setattr(disk, "calls", Plan("rename", fail_with(errno.EACCES)).calls())
    with pytest.warns(RuntimeWarning, match=f"left in {tmp_path}/1 could not be swept: .*Permission denied"):
        fit(make_model(), [offstep.ModelCheckpoint(tmp_path / "{epoch}", in_process=True)], epochs=1)
    assert sorted(os.listdir(tmp_path / "1")) == [leftover, "7"]


def test_unfinished_files_stay_while_another_run_saves_in_the_folder(tmp_path: Path) -> None:
    with another_run(tmp_path):
        (tmp_path / ".offstep-tmp-0a1b2c3d-7").touch()
        fit(make_model(), [offstep.ModelCheckpoint(tmp_path / "best.keras")])
        assert (tmp_path / ".offstep-tmp-0a1b2c3d-7").exists()


def test_a_save_to_a_directory_that_was_deleted_says_so(tmp_path: Path) -> None:
    import shutil

    with offstep.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, TREE)
        checkpointer.wait()
        shutil.rmtree(tmp_path / "run")
        checkpointer.save(2, TREE)
        with pytest.raises(SaveFailed, match="vanished"):
            checkpointer.wait()
