"""`verify` finds what is not as it was written, in our checkpoints all of it, and says where."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import keras
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slots import example_arrays, nest, open_zarr

import offstep
from offstep.errors import CheckpointNotFound

STATE = jax.tree.map(jnp.asarray, nest(example_arrays()))
LEAVES = len(jax.tree.leaves(STATE))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ours")
    with offstep.Checkpointer(directory) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, STATE)
    return directory


def read_leaves(step: Path) -> list[np.ndarray]:
    names = [".".join(map(str, path)) for path in example_arrays()]
    return [open_zarr(step / "pytree", name).read().result() for name in names]


def list_files(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def test_a_whole_checkpoint_is_ok_and_nothing_in_it_is_without_a_checksum(root: Path) -> None:
    report = offstep.verify(root / "1")
    assert report.ok
    assert (report.problems, report.unchecked, report.leaves) == ((), (), LEAVES)
    assert report.files == len(list_files(root / "1")) - 2  # the data file checks itself, and so does the manifest
    assert str(report).startswith(f"{root / '1'}: ok; {report.files} files, {LEAVES} arrays")


def test_a_directory_of_steps_is_all_of_them(root: Path) -> None:
    report = offstep.verify(root)
    assert (report.ok, report.leaves) == (True, 2 * LEAVES)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_flipped_bit_is_found_or_lies_where_nothing_is(root: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from([file for file in list_files(root / "1") if file.stat().st_size]))
    original = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(original) - 1))
    damaged = bytearray(original)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        report = offstep.verify(root / "1")
        if report.ok:  # between two chunks
            assert path.parent.name == "d"
            assert original[bit // 8] == 0
            assert [leaf.tobytes() for leaf in read_leaves(root / "1")] == [
                leaf.tobytes() for leaf in example_arrays().values()
            ]
    finally:
        path.write_bytes(original)


def test_a_flipped_bit_in_an_array_is_told_with_its_leaf(root: Path) -> None:
    [path] = (root / "1/pytree/d").iterdir()
    original = path.read_bytes()
    kernel = example_arrays()["trainable_variables", "d1", "kernel"].tobytes()
    at = original.index(kernel)
    path.write_bytes(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :])
    try:
        [problem] = offstep.verify(root / "1").problems
        [in_root] = offstep.verify(root).problems
    finally:
        path.write_bytes(original)
    assert problem.where == "pytree/trainable_variables.d1.kernel/c/0/0"
    assert problem.expected.startswith("CRC-32C ")
    assert str(problem) == f"{problem.where}: expected {problem.expected}, found {problem.found}"
    assert in_root.where == f"1/{problem.where}"


@pytest.mark.parametrize("how", ["missing", "empty", "short", "long"])
def test_a_file_that_is_missing_or_of_another_size_is_found(root: Path, how: str) -> None:
    for path in list_files(root / "2"):
        original = path.read_bytes()
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes({"empty": b"", "short": original[:-1], "long": original + b"\0"}[how])
        try:
            report = offstep.verify(root / "2")
        finally:
            is_same = path.exists() and path.read_bytes() == original
            path.write_bytes(original)
        if how == "missing" and path.name == "offstep.json":
            assert report.unchecked  # as if stock Orbax had written it
        else:
            assert report.ok == is_same, path


def test_what_stock_orbax_wrote_is_checked_as_far_as_it_can_be(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(pytree=ocp.args.StandardSave(STATE)))
    report = offstep.verify(tmp_path / "3")
    assert report.ok, str(report)
    assert {f"pytree/{'.'.join(map(str, path))}" for path in example_arrays()} <= set(report.unchecked)
    manifest = tmp_path / "3/pytree/manifest.ocdbt"
    content = bytearray(manifest.read_bytes())
    content[-1] ^= 1
    manifest.write_bytes(content)
    [problem] = offstep.verify(tmp_path).problems
    assert problem.where == "3/pytree/manifest.ocdbt"


def test_a_keras_archive_is_checked_by_its_own_checksums(tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    model.save(path)
    assert offstep.verify(path).ok
    content = bytearray(path.read_bytes())
    content[content.index(b"\x89HDF") + 100] ^= 1
    path.write_bytes(content)
    [problem] = offstep.verify(path).problems
    assert problem.where == "model.weights.h5"
    path.write_bytes(content[:1000])
    assert not offstep.verify(path).ok


def test_a_file_without_checksums_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.weights.h5"
    keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)]).save_weights(path)
    report = offstep.verify(path)
    assert report.ok
    assert report.unchecked == ("model.weights.h5",)


def test_a_weights_file_without_its_end_is_damaged_whoever_wrote_it(tmp_path: Path) -> None:
    """One of ours loses its manifest with its end, and passed for one that never had any."""
    model = keras.Sequential([keras.layers.Input((300,)), keras.layers.Dense(20)])
    model.compile("sgd", "mse")
    callback = offstep.ModelCheckpoint(tmp_path / "ours.weights.h5", save_weights_only=True)
    model.fit(np.zeros((2, 300)), np.zeros((2, 20)), callbacks=[callback], verbose=0)
    model.save_weights(tmp_path / "stock.weights.h5")
    for path in (tmp_path / "ours.weights.h5", tmp_path / "stock.weights.h5"):
        assert offstep.verify(path).ok
        content = path.read_bytes()
        for size in (0, 4, 100, len(content) // 2):
            path.write_bytes(content[:size])
            [problem] = offstep.verify(path).problems
            assert (problem.where, problem.expected) == (path.name, "a whole HDF5 file"), size


@pytest.mark.parametrize("offset", [-1, -8, -9, -16])
def test_a_damaged_mark_or_length_of_a_manifest_is_told(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "ours.weights.h5"
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    callback = offstep.ModelCheckpoint(path, save_weights_only=True)
    model.fit(np.zeros((2, 3)), np.zeros((2, 2)), callbacks=[callback], verbose=0)
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    assert not offstep.verify(path).ok


def test_where_there_is_no_checkpoint_there_is_nothing_to_verify(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointNotFound, match="is no checkpoint, and holds no step of one"):
            offstep.verify(path)


def test_neither_jax_nor_keras_is_needed(root: Path) -> None:
    code = f"""
import sys, offstep
assert offstep.verify({str(root)!r}).ok and offstep.verify({str(root)!r}).ok
assert not {{"jax", "keras", "orbax"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
