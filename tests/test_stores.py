"""Checkpoints in object stores: written by the writer process, restored by us there, by stock readers from a copy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import interrupted
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from object_stores import SECRETS, Server, below, download, gs_only, list_objects, run, s3_only, store
from orbax.checkpoint import v1 as ocp
from runs import assert_same, fit, make_model, read_state, read_step

import offstep
from offstep.cli import main
from offstep.errors import CheckpointNotFound
from offstep.listing import list_entries
from offstep.stores.address import parse_address
from offstep.stores.client import Store
from offstep.stores.path import open_place

__all__ = ["run", "store"]  # fixtures


def leave_out(state: dict[str, np.ndarray], *words: str) -> dict[str, np.ndarray]:
    return {name: array for name, array in state.items() if not any(word in name for word in words)}


def test_training_saves_to_a_bucket_what_stock_readers_restore_from_a_copy(run: str, tmp_path: Path) -> None:
    model = make_model()
    callback = offstep.ModelCheckpoint(below(run, "{step}"), save_freq=2, max_to_keep=2, monitor="loss")
    fit(model, [callback], epochs=2)
    assert (callback.counts.durable, callback.counts.failed) == (7, 0)
    trained = read_state(model)
    newest = offstep.latest(run)
    assert str(newest) == below(run, "14") == callback.stats[-1].path
    copy = download(run, tmp_path / "run")
    steps = sorted(int(path.name) for path in copy.iterdir())
    assert steps[-2:] == [12, 14], "the best may be there too"
    assert len(steps) <= 3
    assert_same(read_step(copy / "14"), trained)
    keras.utils.clear_session()  # as in a fresh process, which numbers names from the start
    loaded = read_state(keras.saving.load_model(copy))
    assert_same(*(leave_out(state, "metric", "seed") for state in (loaded, trained)))
    again = make_model()
    report = offstep.restore(again, run)
    assert (report.step, report.missing) == (14, ())
    assert_same(leave_out(read_state(again), "metric"), leave_out(trained, "metric"))


@s3_only
def test_a_large_state_goes_in_pieces_and_comes_back(run: str, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    tree = {f"layer{n}": jnp.asarray(random.random((1300, 1300 + n), np.float32)) for n in range(3)}
    tree |= {"one": jnp.ones(())}
    with offstep.Checkpointer(run) as checkpointer:
        checkpointer.save(3, tree, {"loss": 0.5}, extra={"position": 7})
        checkpointer.wait()
        assert (checkpointer.latest_step(), checkpointer.all_steps()) == (3, [3])
        restored = checkpointer.restore()
        assert checkpointer.restore_extra() == {"position": 7}
    assert len([key for key in list_objects(run) if "/pytree/d/" in key]) == 2
    copy = ocp.load(download(run, tmp_path / "run") / "3", checkpointable_name="pytree")
    for name, array in tree.items():
        np.testing.assert_array_equal(restored[name], array)
        np.testing.assert_array_equal(copy[name], array)


@gs_only
def test_what_nobody_committed_is_no_step(run: str) -> None:
    tree = {"w": jnp.arange(6.0)}
    with offstep.Checkpointer(run) as checkpointer:
        checkpointer.save(1, tree)
        checkpointer.save(2, tree)
        checkpointer.wait()
        place = parse_address(run)
        Store(place).delete((place / "2" / "commit_success.txt").key)
        assert (checkpointer.latest_step(), checkpointer.all_steps()) == (1, [1])
        assert str(offstep.latest(run)) == below(run, "1")
        with pytest.raises(offstep.CheckpointDamaged, match="never committed"):
            offstep.restore(tree, below(run, "2"))
        checkpointer.save(2, tree)
        checkpointer.wait()
        assert checkpointer.all_steps() == [1, 2]


@gs_only
def test_a_step_that_is_saved_again_is_replaced_and_leaves_nothing(run: str) -> None:
    with offstep.Checkpointer(run) as checkpointer:
        checkpointer.save(5, {"w": jnp.zeros(8)})
        checkpointer.wait()
        before = set(list_objects(run))
        checkpointer.save(5, {"w": jnp.ones(8)})
        checkpointer.wait()
        after = set(list_objects(run))
        np.testing.assert_array_equal(checkpointer.restore()["w"], np.ones(8))
    data = {key for key in before if "/d/" in key}
    assert len(before) == len(after)
    assert not data & after


@s3_only
def test_neither_keys_nor_their_server_are_written_into_a_checkpoint(store: Server, run: str, tmp_path: Path) -> None:
    with offstep.Checkpointer(run) as checkpointer:
        checkpointer.save(1, {"w": jnp.zeros(8)})
        checkpointer.wait()
    for path in download(run, tmp_path).rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for secret in (*SECRETS, store.endpoint):
            assert secret.encode() not in content, path


def test_an_empty_place_says_that_there_is_nothing(run: str) -> None:
    assert offstep.latest(run) is None
    with pytest.raises(CheckpointNotFound, match="does not exist"):
        offstep.restore({"w": jnp.zeros(8)}, run)


@s3_only
def test_training_resumes_from_a_bucket(run: str) -> None:
    def train(epochs: int) -> dict[str, np.ndarray]:
        model = make_model()
        callback = offstep.ModelCheckpoint(below(run, "{step}"), save_freq=3, resume=True)
        fit(model, [callback], epochs=epochs)
        return read_state(model)

    train(1)
    resumed = train(2)
    model = make_model()
    fit(model, [], epochs=2)
    assert_same(resumed, read_state(model))
    assert json.loads(open_place(below(run, "12/offstep.json")).read_bytes())["step"] == 12


@gs_only
def test_a_training_goes_on_from_its_backup_in_a_bucket_which_is_deleted_at_the_end(run: str) -> None:
    def back_up() -> list[Any]:
        return [offstep.BackupAndRestore(run, save_freq=1)]

    expected = interrupted.train(list)
    store = Store(parse_address(run))
    notes = (parse_address(run) / "99" / "notes.txt").key
    store.put(notes, b"somebody else's")
    actual = interrupted.train(back_up, [interrupted.Interrupt(3), interrupted.Interrupt(5)])
    assert actual.attempts == 3
    interrupted.assert_equal(actual, replace(expected, decisions=actual.decisions))
    assert list_objects(run) == ["99/notes.txt"]


@gs_only
def test_what_is_no_checkpoint_is_neither_replaced_nor_swept(run: str) -> None:
    place = parse_address(run)
    theirs, left = ("4/pytree.csv", "5/2024/sales.csv"), "4/pytree/d/" + 32 * "a"
    for name in (*theirs, left):
        Store(place).put((place / name).key, b"a, b")
    with offstep.Checkpointer(run, max_to_keep=1) as checkpointer:
        with pytest.raises(offstep.SaveFailed, match="an object that is of no checkpoint has the name of this step"):
            checkpointer.save(5, {"w": jnp.zeros(3)}).wait()
        checkpointer.save(6, {"w": jnp.zeros(3)}).wait()
    assert {name for name in list_objects(run) if not name.startswith("6/")} == set(theirs)


@pytest.mark.parametrize("name", ["best.keras", "best.weights.h5"])
@s3_only
def test_a_file_of_keras_is_one_object(name: str, run: str, tmp_path: Path) -> None:
    model = make_model()
    is_weights = name.endswith(".weights.h5")
    fit(model, [offstep.ModelCheckpoint(below(run, f"{name}"), save_weights_only=is_weights)], epochs=2)
    assert list_objects(run) == [name]
    again = make_model()
    assert str(offstep.restore(again, run).path) == below(run, f"{name}")
    copy = download(run, tmp_path) / name
    stock = make_model()
    stock.optimizer.build(stock.trainable_variables)
    stock.load_weights(copy)
    for restored in (again, stock):
        for got, want in zip(restored.trainable_variables, model.trainable_variables, strict=True):
            np.testing.assert_array_equal(got, want)


@s3_only
def test_files_of_keras_beyond_the_newest_go(run: str) -> None:
    callback = offstep.ModelCheckpoint(below(run, "{epoch}.keras"), max_to_keep=2)
    fit(make_model(), [callback], epochs=3)
    assert list_objects(run) == ["2.keras", "3.keras"]
    assert str(offstep.latest(run)) == below(run, "3.keras")
    entries = list_entries(open_place(run))
    assert [(entry.path.name, entry.step, entry.epoch) for entry in entries] == [("2.keras", 14, 2), ("3.keras", 21, 3)]


def test_the_command_works_there(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    with offstep.Checkpointer(run) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"w": jnp.full(8, step)}, {"loss": 1 / step})
    place = parse_address(run)
    Store(place).delete((place / "3" / "commit_success.txt").key)

    def command(*arguments: str) -> tuple[int, dict[str, Any]]:
        code = main([*arguments, "--json"])
        return code, json.loads(capsys.readouterr().out)

    code, answer = command("ls", run)
    assert (code, [entry["step"] for entry in answer["checkpoints"]]) == (0, [1, 2])
    assert all(entry["is_whole"] and entry["size_bytes"] > 0 for entry in answer["checkpoints"])
    assert command("latest", run) == (0, {"path": below(run, "2")})
    code, answer = command("verify", run)
    assert (code, answer["ok"], len(answer["checkpoints"])) == (0, True, 2)
    data = next(name for name in list_objects(run) if name.startswith("2/pytree/d/"))
    content = bytearray(Store(place).get((place / data).key) or b"")
    content[5] ^= 1
    Store(place).put((place / data).key, bytes(content))
    code, answer = command("verify", below(run, "2"))
    assert (code, answer["ok"]) == (5, False)
    assert not offstep.verify(run).ok
    with pytest.raises(SystemExit):
        main(["average", run, run, "s3://bucket/average"])
    capsys.readouterr()
    assert command("prune", run, "--keep", "1")[0] == 0
    assert offstep.latest(run, verify=False).name == "2"
    assert not [name for name in list_objects(run) if name.startswith("1/")]
