"""Checkpoints made of others by `export` and `average`: what stock readers find in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from command import offstep
from orbax.checkpoint import v1
from runs import assert_same, fit, make_model, read_state, read_step
from safetensors.numpy import load_file
from slots import save_arrays

from offstep import Checkpointer, ModelCheckpoint
from offstep.blocks import read_blocks, split_leaf
from offstep.discovery import open_checkpoint
from offstep.formats import file_manifest
from offstep.stored import StoredLeaf

pytestmark = pytest.mark.usefixtures("one_writer")

OK, USAGE, UNSUITABLE, REFUSED = 0, 2, 4, 6
State = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """Two steps of one run, in a directory and as files of both kinds; the last state. Not to be changed."""
    directory = tmp_path_factory.mktemp("saved")
    model = make_model()
    callbacks = [
        ModelCheckpoint(directory / "steps/{step}", in_process=True),
        ModelCheckpoint(directory / "{step}.keras", in_process=True),
        ModelCheckpoint(directory / "{step}.weights.h5", save_weights_only=True, in_process=True),
        keras.callbacks.OrbaxCheckpoint(directory / "stock", max_to_keep=2),
    ]
    fit(model, callbacks, epochs=2)
    return directory, read_state(model)


def make_built_model() -> Any:  # of Keras
    model = make_model()
    model.optimizer.build(model.trainable_variables)
    return model


# --- export ----------------------------------------------------------------------------------------------------------


def test_safetensors_and_npz_hold_every_leaf(saved: tuple[Path, State], tmp_path: Path) -> None:
    directory, state = saved
    assert offstep("export", directory / "steps", tmp_path / "m.safetensors").code == OK
    assert_same(load_file(tmp_path / "m.safetensors"), state)
    assert offstep("export", directory / "steps", tmp_path / "m.npz").code == OK
    with np.load(tmp_path / "m.npz") as found:
        assert_same(dict(found), state)
    assert sorted(os.listdir(tmp_path)) == ["m.npz", "m.safetensors"]


def test_weights_only_leaves_the_rest_out(saved: tuple[Path, State], tmp_path: Path) -> None:
    directory, _ = saved
    run = offstep("export", directory / "steps/7", tmp_path / "m.npz", "--weights-only", "--json")
    assert run.document["leaves"] == 8
    with np.load(tmp_path / "m.npz") as found:
        assert {name.split("/")[0] for name in found} == {"trainable_variables", "non_trainable_variables"}
        assert not any("seed" in name for name in found)


def test_dtypes_that_numpy_does_not_know_are_exactly_converted(tmp_path: Path) -> None:
    arrays: Any = {
        ("bf16",): np.array([1.5, -2], ml_dtypes.bfloat16),
        ("f8",): np.array([0.5], ml_dtypes.float8_e4m3fn),
        ("f16",): np.array([0.25], np.float16),
        ("i4",): np.array([-3], ml_dtypes.int4),
        ("scalar",): np.array(7, np.int64),
    }
    path = save_arrays(tmp_path, 1, arrays)
    assert offstep("export", path, tmp_path / "m.npz").code == OK
    with np.load(tmp_path / "m.npz") as found:
        assert {name: (array.dtype.name, array.tolist()) for name, array in found.items()} == {
            "bf16": ("float32", [1.5, -2.0]),
            "f8": ("float32", [0.5]),
            "f16": ("float16", [0.25]),
            "i4": ("int32", [-3]),
            "scalar": ("int64", 7),
        }
    run = offstep("export", path, tmp_path / "m.safetensors")
    assert (run.code, run.err) == (UNSUITABLE, "offstep: i4: safetensors has no int4; export to .npz instead\n")
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("source", ["steps/14", "14.keras", "stock"])
def test_files_of_keras_are_made_of_a_directory(source: str, saved: tuple[Path, State], tmp_path: Path) -> None:
    directory, state = saved
    for name in ("m.keras", "m.weights.h5"):
        assert offstep("export", directory / source, tmp_path / name).code == OK
    model = keras.saving.load_model(tmp_path / "m.keras")
    found = read_state(model)
    assert found["trainable_variables/first/kernel"].tobytes() == state["trainable_variables/first/kernel"].tobytes()
    momenta = [name for name in found if "momentum" in name]
    assert momenta
    for name in momenta:
        assert found[name].tobytes() == state[name].tobytes()
    other = make_built_model()
    other.load_weights(tmp_path / "m.weights.h5")
    assert np.array_equal(other.get_layer("last").kernel, state["trainable_variables/last/kernel"])


def test_what_has_no_configuration_is_told(saved: tuple[Path, State], tmp_path: Path) -> None:
    run = offstep("export", saved[0] / "14.weights.h5", tmp_path / "m.keras")
    assert run.code == UNSUITABLE
    assert "has no configuration of a Keras model" in run.err


def test_nothing_is_replaced_unasked(saved: tuple[Path, State], tmp_path: Path) -> None:
    (tmp_path / "m.npz").write_text("precious")
    run = offstep("export", saved[0] / "steps", tmp_path / "m.npz")
    assert run.code == REFUSED
    assert "--force replaces it" in run.err
    assert (tmp_path / "m.npz").read_text() == "precious"
    assert offstep("export", saved[0] / "steps", tmp_path / "m.npz", "--force").code == OK
    run = offstep("export", saved[0] / "steps", tmp_path / "m.onnx")
    assert run.code == USAGE
    assert ".safetensors, .npz, .keras or .weights.h5" in run.err


# --- average ---------------------------------------------------------------------------------------------------------


def expected_mean(first: State, last: State) -> State:
    """The mean of floating weights, all else of the last."""

    def choose(name: str) -> np.ndarray:
        is_averaged = name.startswith(("trainable_variables/", "non_trainable_variables/"))
        if not is_averaged or last[name].dtype.kind != "f":
            return last[name]
        mean = (first[name].astype(np.float64) + last[name].astype(np.float64)) / 2
        return mean.astype(last[name].dtype)

    return {name: choose(name) for name in last}


@pytest.mark.parametrize("root", ["steps", "stock"])
def test_the_average_of_directories_is_one_that_stock_readers_read(
    root: str, saved: tuple[Path, State], tmp_path: Path
) -> None:
    directory, _ = saved
    first, last = (directory / root / name for name in sorted(os.listdir(directory / root), key=int)[-2:])
    run = offstep("average", first, last, tmp_path / "14")
    assert (run.code, run.err) == (OK, "")
    expected = expected_mean(read_step(first), read_step(last))
    assert_same(read_step(tmp_path / "14"), expected)
    keras.utils.clear_session()
    model = keras.saving.load_model(tmp_path)
    for name, array in read_state(model).items():
        if name.startswith(("trainable", "non_trainable", "optimizer")) and "seed" not in name:
            assert array.tobytes() == expected[name].tobytes(), name
    assert offstep("verify", tmp_path).code == OK
    assert os.listdir(tmp_path) == ["14"]


@pytest.mark.parametrize("suffix", ["keras", "weights.h5"])
def test_the_average_of_files_is_a_file_that_keras_reads(
    suffix: str, saved: tuple[Path, State], tmp_path: Path
) -> None:
    directory, state = saved
    paths = [directory / f"{step}.{suffix}" for step in (7, 14)]
    assert offstep("average", *paths, tmp_path / f"mean.{suffix}").code == OK
    model = make_built_model()
    model.load_weights(tmp_path / f"mean.{suffix}")
    expected = expected_mean(read_step(directory / "steps/7"), state)
    assert np.array_equal(model.get_layer("first").kernel, expected["trainable_variables/first/kernel"])
    assert np.array_equal(model.get_layer("norm").moving_mean, expected["non_trainable_variables/norm/moving_mean"])
    if suffix == "keras":
        assert keras.saving.load_model(tmp_path / "mean.keras").optimizer.iterations == 14
    assert os.listdir(tmp_path) == [f"mean.{suffix}"]
    kept = file_manifest.read(tmp_path / f"mean.{suffix}")
    assert kept is not None
    assert (kept.step, kept.metrics, kept.extra) == (14, {}, {"averaged": list(map(str, paths))})
    assert file_manifest.covers(kept.files) == (suffix == "weights.h5")
    assert offstep("verify", tmp_path / f"mean.{suffix}").code == OK
    assert offstep("latest", tmp_path, "--verify").code == OK


def test_the_newest_and_the_best_are_chosen(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", in_process=True) as checkpointer:
        for step, loss in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.8)):
            checkpointer.save(step, {"w": np.full(3, step, np.float32)}, metrics={"loss": loss})
    run = offstep("average", tmp_path / "run", tmp_path / "newest", "--newest", "2", "--json")
    assert run.document["averaged"] == [f"{tmp_path}/run/3", f"{tmp_path}/run/4"]
    assert v1.load(tmp_path / "newest", checkpointable_name="pytree")["w"].tolist() == [3.5, 3.5, 3.5]
    run = offstep("average", tmp_path / "run", tmp_path / "best", "--best", "2", "--json")
    assert run.document["averaged"] == [f"{tmp_path}/run/1", f"{tmp_path}/run/3"]
    assert v1.load(tmp_path / "best", checkpointable_name="pytree")["w"].tolist() == [2.0, 2.0, 2.0]


def test_other_structures_are_refused(tmp_path: Path) -> None:
    save_arrays(tmp_path, 1, {("w",): np.ones(2)})
    save_arrays(tmp_path, 2, {("w",): np.ones(3)})
    run = offstep("average", tmp_path / "1", tmp_path / "2", tmp_path / "out")
    assert run.code == UNSUITABLE
    assert "w: " in run.err
    assert "holds float64[2]" in run.err
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]
    assert offstep("average", tmp_path / "1", tmp_path / "out").code == USAGE
    run = offstep("average", tmp_path / "1", tmp_path / "1", tmp_path / "out.keras")
    assert run.code == UNSUITABLE
    assert "is orbax_directory: give a directory" in run.err


def test_trees_of_stock_orbax_keep_their_structure(tmp_path: Path) -> None:
    tree = {"a": [np.ones((300, 5), np.float32), np.zeros(2, np.int32)], "none": {}, "k": np.float32(2)}
    with ocp.StandardCheckpointer() as checkpointer:
        for name, factor in (("one", 1), ("two", 3)):
            checkpointer.save(tmp_path / name, {"a": [tree["a"][0] * factor, tree["a"][1]], "none": {}, "k": tree["k"]})
    assert offstep("average", tmp_path / "one", tmp_path / "two", tmp_path / "mean").code == OK
    found = v1.load(tmp_path / "mean", checkpointable_name="pytree")
    assert np.asarray(found["a"][0]).tolist() == np.full((300, 5), 2.0).tolist()
    assert (found["none"], float(found["k"])) == ({}, 2.0)


# --- pieces ----------------------------------------------------------------------------------------------------------


def test_a_leaf_is_read_in_pieces_that_follow_each_other(tmp_path: Path) -> None:
    array = np.arange(7 * 5 * 3, dtype=np.float32).reshape(7, 5, 3)
    reader = open_checkpoint(save_arrays(tmp_path, 1, {("w",): array}))
    leaf = reader.contents.leaves[0]
    for block_bytes in (1, 12, 60, 100, 1000):
        blocks = list(read_blocks(reader, leaf, block_bytes=block_bytes))
        assert b"".join(block.tobytes() for block in blocks) == array.tobytes()
        assert all(block.nbytes <= max(4, block_bytes) for block in blocks)
    reader.close()
    assert len(list(split_leaf(StoredLeaf(("s",), (), "float32")))) == 1
