"""`BackupAndRestore` as a drop-in for Keras's."""

from __future__ import annotations

import copy
import os
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import interpreters
import keras
import numpy as np
import pytest
from failing_disk import Plan
from interrupted import BATCHES, Interrupt, Interrupted, fit, let_go, make_model
from runs import list_steps

from offstep import BackupAndRestore, CheckpointNotFound, ModelCheckpoint, StructureMismatch, disk, ownership

pytestmark = [
    pytest.mark.usefixtures("one_writer"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras, within `pytest.warns`
]


def test_tests_of_keras_pass_with_ours_in_its_place(tmp_path: Path) -> None:
    import keras.src.callbacks.backup_and_restore as theirs

    tests = Path(theirs.__file__).with_name("backup_and_restore_test.py")
    options = ["-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"]
    options += ["-q", "-p", "place_backup", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={tmp_path}"]
    options.append("--import-mode=importlib")  # else an installed offstep would come before the one under test
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    finished = interpreters.run([*options, tests], env=os.environ | {"PYTHONPATH": path})
    assert "7 passed" in finished.stdout, finished.stdout + finished.stderr


def test_where_stock_trains_seventeen_batches_of_fifteen_ours_trains_fifteen(tmp_path: Path) -> None:
    backup, model = BackupAndRestore(tmp_path, save_freq=1), make_model()
    data: dict[str, Any] = {"x": np.ones((10, 3)), "y": np.ones((10, 1)), "batch_size": 4}
    with pytest.raises(Interrupted):
        fit(model, [backup, Interrupt(3)], **data)
    history = fit(model, [backup], **data, epochs=5)
    assert int(model.optimizer.iterations) == 15
    assert history.epoch == [0, 1, 2, 3, 4]


def test_finished_it_deletes_its_backups_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    fit(make_model(), [BackupAndRestore(tmp_path)], epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    fit(make_model(), [BackupAndRestore(tmp_path / "b")], epochs=1)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("double_checkpoint", "kept"), [(False, [2 * BATCHES]), (True, [BATCHES, 2 * BATCHES])])
def test_it_keeps_one_backup_or_two(tmp_path: Path, double_checkpoint: bool, kept: list[int]) -> None:
    backup = BackupAndRestore(tmp_path, double_checkpoint=double_checkpoint, delete_checkpoint=False)
    fit(make_model(), [backup], epochs=2)
    assert list_steps(tmp_path) == kept


def test_a_better_backup_does_not_stay_beside_the_newest(tmp_path: Path) -> None:
    worse = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(val_loss=float(epoch)))
    fit(make_model(), [worse, BackupAndRestore(tmp_path, delete_checkpoint=False)], epochs=3)
    assert list_steps(tmp_path) == [3 * BATCHES]


def test_backups_are_deleted_before_another_run_may_have_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    was_free = []
    monkeypatch.setattr(disk, "calls", Plan("rename", lambda: was_free.append(ownership.is_alone(tmp_path))).calls())
    fit(make_model(), [BackupAndRestore(tmp_path)], epochs=1)
    assert was_free == [False]
    assert not tmp_path.exists()


def test_backups_of_a_run_that_took_over_stay(tmp_path: Path) -> None:
    def take_over() -> None:
        code = f"""
import jax.numpy as jnp, offstep
with offstep.Checkpointer({str(tmp_path)!r}, takeover=True) as checkpointer:
    checkpointer.save(1000, {{"w": jnp.ones(3)}})
"""
        interpreters.run(["-c", code]).check_returncode()

    late = keras.callbacks.LambdaCallback(on_train_end=lambda logs: take_over())
    with pytest.warns(RuntimeWarning, match="another run has taken .* over: the backups are its own now"):
        fit(make_model(), [late, BackupAndRestore(tmp_path)], epochs=1)
    assert 1000 in list_steps(tmp_path)


def test_a_relative_directory_is_the_one_that_training_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    leave = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: monkeypatch.chdir(tmp_path / "elsewhere"))
    backup = BackupAndRestore("backup", delete_checkpoint=False)
    fit(make_model(), [backup, leave], epochs=1)
    assert backup._weights_path == f"{tmp_path}/backup/{BATCHES}/pytree/manifest.ocdbt"
    monkeypatch.chdir(tmp_path)
    fit(make_model(), [BackupAndRestore("backup"), leave], epochs=2)
    assert not (tmp_path / "backup").exists()


def test_a_damaged_backup_is_deleted_at_the_end_too(tmp_path: Path) -> None:
    fit(make_model(), [BackupAndRestore(tmp_path, delete_checkpoint=False)], epochs=1)
    (tmp_path / f"{BATCHES}/pytree/_METADATA").write_bytes(b"")
    shutil.copytree(tmp_path / str(BATCHES), tmp_path / "1")
    (tmp_path / str(BATCHES)).rename(tmp_path / "2")
    (tmp_path / "1000").mkdir()
    (tmp_path / "1000/notes.txt").write_text("mine")
    fit(make_model(), [BackupAndRestore(tmp_path, save_freq=1)], epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["1000"]


def test_without_a_frequency_it_only_restores(tmp_path: Path) -> None:
    fit(make_model(), [BackupAndRestore(tmp_path, delete_checkpoint=False)], epochs=1)
    model = make_model()
    fit(model, [BackupAndRestore(tmp_path, save_freq=False, delete_checkpoint=False)], epochs=2)
    assert int(model.optimizer.iterations) == 2 * BATCHES
    assert list_steps(tmp_path) == [BATCHES]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"backup_dir": ""}, "Empty `backup_dir` argument passed. Received: backup_dir=''"),
        ({"backup_dir": None}, "Empty `backup_dir` argument passed. Received: backup_dir=None"),
        (
            {"backup_dir": "b", "save_freq": "batch"},
            "Invalid value for argument `save_freq`. Received: save_freq=batch",
        ),
        ({"backup_dir": "b", "save_freq": 0.15}, "Received: save_freq=0.15."),
        ({"backup_dir": "b", "save_freq": -1}, "Received: save_freq=-1"),
        ({"backup_dir": "b", "slots": 0}, "Received: 0"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        BackupAndRestore(**arguments)


def test_a_backup_of_weights_alone_is_no_training_to_resume() -> None:
    with pytest.raises(ValueError, match="Received: save_weights_only=True"):
        ModelCheckpoint("ckpts/{step}", save_weights_only=True, resume=True)


def test_a_damaged_backup_gives_way_to_the_one_before_and_that_is_said(tmp_path: Path) -> None:
    fit(make_model(), [BackupAndRestore(tmp_path, double_checkpoint=True, delete_checkpoint=False)], epochs=2)
    [data] = (tmp_path / f"{2 * BATCHES}" / "pytree" / "d").iterdir()
    flip_a_bit(data, 40)
    model = make_model()
    with pytest.warns(UserWarning, match=f"/{2 * BATCHES} cannot be resumed from, an older checkpoint is tried"):
        history = fit(model, [BackupAndRestore(tmp_path)], epochs=3)
    assert int(model.optimizer.iterations) == 3 * BATCHES
    assert history.epoch == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:.*cannot be resumed from")
def test_where_no_backup_can_be_read_nothing_is_trained(tmp_path: Path) -> None:
    fit(make_model(), [BackupAndRestore(tmp_path, delete_checkpoint=False)], epochs=1)
    flip_a_bit(tmp_path / f"{BATCHES}" / "offstep-extra", 100)
    backup = BackupAndRestore(tmp_path)
    with pytest.raises(CheckpointNotFound, match="delete the directory to start anew"):
        fit(make_model(), [backup])
    let_go([backup])


def test_a_backup_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    fit(make_model(), [BackupAndRestore(tmp_path, delete_checkpoint=False)], epochs=1)
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1, name="another")])
    model.compile("adam", "mse")
    backup = BackupAndRestore(tmp_path)
    with pytest.raises(StructureMismatch, match=r"does not fit the target, which was not changed:"):
        fit(model, [backup])
    let_go([backup])


def flip_a_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_copy_of_a_used_backup_backs_up_for_itself(tmp_path: Path) -> None:
    backup = BackupAndRestore(tmp_path)
    with pytest.raises(Interrupted):
        fit(make_model(), [backup, Interrupt(BATCHES + 2)])
    let_go([backup])
    copied = pickle.loads(pickle.dumps(copy.deepcopy(backup)))
    model = make_model()
    fit(model, [copied])
    assert int(model.optimizer.iterations) == 4 * BATCHES


def test_a_backup_takes_a_directory_over_if_asked(tmp_path: Path) -> None:
    assert BackupAndRestore(tmp_path, takeover=True).saver._takeover
    assert not BackupAndRestore(tmp_path).saver._takeover
