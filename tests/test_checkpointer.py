"""The engine's face for any JAX pytree: what it saves, restores, keeps, skips, and says when something is wrong."""

from __future__ import annotations

import errno
import json
import operator
import os
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1
from processes import count_slots, find_writers, wait_until
from slots import assert_same

import offstep
from offstep import catalog
from offstep._native import crc32c
from offstep.checkpointer import Checkpointer
from offstep.errors import (
    BudgetExceeded,
    CheckpointDamaged,
    CheckpointNotFound,
    SaveFailed,
    SaveReplaced,
    SaveTimeout,
    StructureMismatch,
    UnsupportedLeaf,
)
from offstep.manifest import FileRecord, Manifest, read

pytestmark = pytest.mark.usefixtures("one_writer")


class Moments(NamedTuple):
    """As optax has them."""

    count: Any
    mu: Any
    nu: Any


class Empty(NamedTuple):
    """As `optax.EmptyState`."""


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    kernel: Any
    bias: Any


def tree(step: int = 1) -> dict[str, Any]:
    return {"w": jnp.full((4, 3), step, jnp.float32), "b": jnp.full((3,), step, jnp.bfloat16)}


def read_manifest(checkpoint: Path) -> Manifest:
    manifest = read(checkpoint)
    assert manifest is not None
    return manifest


@contextmanager
def stopped_writer() -> Iterator[None]:
    """A disk that does not answer, for as long as the block lasts."""
    [writer] = find_writers()
    writer.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        writer.send_signal(signal.SIGCONT)


# -------------------------------------------------------------------------------------------- saving and restoring

TREES = {
    "nested dicts": {"a": {"b": {"c": jnp.ones(3)}}, "d": jnp.zeros(2)},
    "lists": {"layers": [jnp.ones(1), jnp.ones(2), [jnp.ones(3)]]},
    "tuples": {"pair": (jnp.ones(1), jnp.ones(2))},
    "a list at the root": [jnp.ones(1), {"x": jnp.ones(2)}],
    "a tuple at the root": (jnp.ones(1), jnp.ones(2)),
    "more than ten in a list": [jnp.full(1, number) for number in range(12)],
    "empty containers": {"w": jnp.ones(1), "none": None, "dict": {}, "list": [], "tuple": (), "deep": {"x": [{}]}},
    "a named tuple": {"opt": Moments(jnp.int32(1), {"w": jnp.ones(2)}, {"w": jnp.zeros(2)})},
    "an optax state": (Moments(jnp.int32(1), jnp.ones(2), jnp.ones(2)), Empty(), (Empty(), jnp.ones(1))),
    "a dataclass": {"layer": Layer(jnp.ones((2, 2)), jnp.zeros(2))},
    "integer keys": {"layers": {0: jnp.ones(1), 10: jnp.ones(2), 2: jnp.ones(3)}},
    "odd names": {"a.b/c": jnp.ones(1), "ü \n'\"": jnp.ones(2), "%41": jnp.ones(3), "c": {"0": jnp.ones(4)}},
    "one array": {"only": jnp.ones((0 + 1,))},
}
all_trees = pytest.mark.parametrize("state", TREES.values(), ids=TREES.keys())


@all_trees
def test_a_tree_comes_back_in_the_structure_that_is_asked_for(tmp_path: Path, state: Any) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state)
        checkpointer.wait()
        assert_same(checkpointer.restore(3, state), state)
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        assert_same(checkpointer.restore(like=abstract), state)


@all_trees
def test_a_tree_comes_back_as_orbax_would_have_restored_its_own(tmp_path: Path, state: Any) -> None:
    with Checkpointer(tmp_path / "ours") as checkpointer:
        checkpointer.save(3, state)
        checkpointer.wait()
        ours = checkpointer.restore(3)
    v1.save(tmp_path / "theirs", state)
    theirs = v1.load(tmp_path / "theirs")
    assert_same(ours, theirs)


KINDS = {
    "NumPy arrays and numbers": {"array": np.arange(6.0).reshape(2, 3), "int": 3, "float": 0.5, "bool": True},
    "keys": {"key": jax.random.key(7), "w": jnp.ones(2)},
    "dtypes": {name: jnp.ones(3, name) for name in ("bfloat16", "float8_e4m3fn", "uint8", "complex64", "bool")},
}


@pytest.mark.parametrize("state", KINDS.values(), ids=KINDS.keys())
def test_leaves_of_each_kind_come_back_as_orbax_would_have_restored_its_own(tmp_path: Path, state: Any) -> None:
    with Checkpointer(tmp_path / "ours") as checkpointer:
        checkpointer.save(3, state)
        checkpointer.wait()
        ours = checkpointer.restore(3), checkpointer.restore(3, state)
    v1.save(tmp_path / "theirs", state)
    theirs = v1.load(tmp_path / "theirs"), v1.load(tmp_path / "theirs", state)
    for mine, its in zip(ours, theirs, strict=True):
        assert list(map(describe, jax.tree.leaves(mine))) == list(map(describe, jax.tree.leaves(its)))


def describe(leaf: Any) -> tuple[Any, ...]:
    kind = jax.Array if isinstance(leaf, jax.Array) else type(leaf)
    if kind is jax.Array and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    host = np.asarray(leaf)
    return kind, host.dtype, host.shape, host.tobytes(), getattr(leaf, "sharding", None)


def test_a_step_that_does_not_fit_is_told_by_leaf(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree(2))
        checkpointer.wait()
        with pytest.raises(StructureMismatch, match=r"more: the checkpoint does not have it"):
            checkpointer.restore(like=tree() | {"more": jnp.ones(1)})
        with pytest.raises(StructureMismatch, match=r"b: the checkpoint has it, the target does not"):
            checkpointer.restore(like={"w": tree()["w"]})
        with pytest.raises(StructureMismatch, match=r"seed_generator_state, which the tree asks for"):
            checkpointer.restore(like=tree() | {"seed_generator_state": jnp.ones(1)})
        with pytest.raises(StructureMismatch, match=r"w: the checkpoint holds float32\[4, 3\], expected"):
            checkpointer.restore(like=tree() | {"w": jnp.ones((3, 4))})
        other = checkpointer.restore(like=jax.tree.map(lambda leaf: leaf.astype(jnp.float16), tree()))
        assert_same(other, jax.tree.map(lambda leaf: leaf.astype(jnp.float16), tree(2)))


def test_a_damaged_step_is_refused_before_it_is_used(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree())
        checkpointer.wait()
        [data] = (tmp_path / "1/pytree/d").iterdir()
        content = bytearray(data.read_bytes())
        content[3] ^= 1
        data.write_bytes(content)
        with pytest.raises(CheckpointDamaged, match="its checksum is wrong"):
            checkpointer.restore()


def test_a_newest_step_that_is_damaged_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    """One whose files had not their sizes was once passed over without a word, and a flipped bit was the end."""
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, tree(step), extra={"at": step})
            checkpointer.wait()
        [data] = (tmp_path / "2/pytree/d").iterdir()
        content = bytearray(data.read_bytes())
        content[3] ^= 1
        data.write_bytes(content)
        (tmp_path / "3/pytree/_METADATA").unlink()
        with pytest.warns(RuntimeWarning) as warned:
            assert_same(checkpointer.restore(), tree(1))
        first, second = (str(warning.message) for warning in warned)
        assert "3 is no whole checkpoint and is passed over: pytree/_METADATA is missing" in first
        assert second.startswith("a newer step is passed over: ")
        assert "its checksum is wrong" in second
        with pytest.warns(RuntimeWarning, match="3 is no whole checkpoint"):
            assert checkpointer.restore_extra() == {"at": 2}


def test_a_newest_step_whose_shardings_are_damaged_is_passed_over(tmp_path: Path) -> None:
    """It went to Orbax, which knows more shardings than we do, and whose error was the end."""
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, tree(step))
        checkpointer.wait()
        shardings = tmp_path / "2/pytree/_sharding"
        shardings.write_bytes(shardings.read_bytes().replace(b"device_str", b"devicd_str"))
        with pytest.warns(RuntimeWarning, match="passed over: .*_sharding is not what was written"):
            assert_same(checkpointer.restore(), tree(1))


@all_trees
def test_stock_orbax_of_the_older_interface_restores_a_tree(tmp_path: Path, state: Any) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    with ocp.StandardCheckpointer() as standard:
        assert_same(standard.restore(tmp_path / "3/pytree", abstract), state)
    with ocp.CheckpointManager(tmp_path, item_names=("pytree",)) as manager:
        assert manager.all_steps() == [3]
        restored = manager.restore(3, args=ocp.args.Composite(pytree=ocp.args.StandardRestore(abstract)))
        assert_same(restored["pytree"], state)


@pytest.mark.parametrize("state", [{}, [], (), None, Empty()], ids=repr)
def test_a_tree_without_anything_in_it_is_refused(tmp_path: Path, state: Any) -> None:
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(UnsupportedLeaf, match=r"the tree is empty\. Received: "),
    ):
        checkpointer.save(1, state)


@pytest.mark.parametrize("state", [{"a": None}, {"a": {}, "b": []}], ids=repr)
def test_a_tree_of_empty_containers_only_is_refused(tmp_path: Path, state: Any) -> None:
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UnsupportedLeaf, match="the tree holds no array"):
        checkpointer.save(1, state)


def test_a_bare_array_is_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UnsupportedLeaf, match="put it into a dict"):
        checkpointer.save(1, jnp.ones(3))


def test_an_array_without_elements_comes_back(tmp_path: Path) -> None:
    state = {"w": jnp.ones(2), "none": jnp.ones((0, 3))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.wait()
        assert_same(checkpointer.restore(1, state), state)


def test_two_leaves_that_orbax_would_store_under_one_name_are_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UnsupportedLeaf, match=r"'a\.b'.*rename one of them"):
        checkpointer.save(1, {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})


def test_a_structure_may_change_between_saves(tmp_path: Path) -> None:
    states = [
        {"w": jnp.ones(3)},
        {"w": jnp.ones(4)},
        {"w": jnp.ones(4, jnp.bfloat16)},
        {"w": jnp.ones(4), "b": jnp.ones(1)},
        [jnp.ones(4), jnp.ones(1)],
        (jnp.ones(4), jnp.ones(1)),
        [jnp.ones(4), None, jnp.ones(1)],
        {"w": jnp.ones(3)},
    ]
    with Checkpointer(tmp_path) as checkpointer:
        for step, state in enumerate(states):
            checkpointer.save(step, state)
        checkpointer.wait()
        for step, state in enumerate(states):
            assert_same(checkpointer.restore(step, state), state)


def test_the_manifest_says_what_the_checkpoint_is_and_covers_every_file(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(np.int64(7), tree(), metrics={"loss": jnp.float32(0.5), "accuracy": np.float64(1.0)})
    manifest = read_manifest(tmp_path / "7")
    assert (manifest.step, manifest.epoch, manifest.batch, manifest.nonfinite) == (7, None, None, 0)
    assert manifest.metrics == {"loss": 0.5, "accuracy": 1.0}
    assert manifest.versions == {"offstep": offstep.__version__, "jax": jax.__version__}
    assert len(manifest.run) == 8
    written = {str(path.relative_to(tmp_path / "7")) for path in (tmp_path / "7").rglob("*") if path.is_file()}
    assert set(manifest.files) == written - {"offstep.json"}
    for name, record in manifest.files.items():
        content = (tmp_path / "7" / name).read_bytes()
        assert record == FileRecord(len(content), None if name.startswith("pytree/d/") else crc32c(content)), name


def test_metrics_that_are_no_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    """They were written as bare NaN, which is no JSON."""
    metrics = {"loss": float("nan"), "worst": float("inf"), "best": -float("inf")}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, tree(), metrics=metrics)
    manifest = read_manifest(tmp_path / "7")
    assert str(manifest.metrics) == str(metrics)
    stored = json.loads((tmp_path / "7/offstep.json").read_text())["metrics"]
    assert stored == {"loss": "NaN", "worst": "Infinity", "best": "-Infinity"}


@pytest.mark.parametrize("mode", ["host", "device_copy"])
def test_values_that_are_not_finite_are_counted(tmp_path: Path, mode: Any) -> None:
    nan, inf = float("nan"), float("inf")
    state = {
        "float32": jnp.array([nan, 1, inf, -inf]),
        "bfloat16": jnp.full((3, 5), nan, jnp.bfloat16),
        "float16": jnp.array(inf, jnp.float16),
        "complex64": jnp.array([complex(nan, inf), 1j], jnp.complex64),
        "float64": np.array([nan, 1.0]),
        "int32": jnp.full(4, -1, jnp.int32),
    }
    with Checkpointer(tmp_path, snapshot_mode=mode) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.save(2, jax.tree.map(lambda array: array * 0 if array.dtype == "int32" else array, state))
    assert [read_manifest(tmp_path / str(step)).nonfinite for step in (1, 2)] == [22, 22]


# ------------------------------------------------------------------------------------------------- which steps


def save_losses(directory: Path, losses: dict[int, float], **options: Any) -> list[str]:
    with Checkpointer(directory, **options) as checkpointer:
        for step, loss in losses.items():
            checkpointer.save(step, tree(), metrics={"loss": loss})
    return sorted(os.listdir(directory), key=int)


LOSSES = {1: 5.0, 2: 1.0, 3: 2.0, 4: 0.5, 5: float("nan"), 6: 7.0, 7: 6.0}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"max_to_keep": 2}, ["6", "7"]),
        ({"max_to_keep": 2, "monitor": "loss"}, ["4", "6", "7"]),
        ({"max_to_keep": 1, "monitor": "loss", "keep_best": 3}, ["2", "3", "4", "7"]),
        ({"max_to_keep": 1, "monitor": "loss", "mode": "max"}, ["6", "7"]),
        ({"max_to_keep": 1, "keep_every": 3}, ["3", "6", "7"]),
        ({"max_to_keep": 1, "monitor": "loss", "keep_every": 3}, ["3", "4", "6", "7"]),
        ({"max_to_keep": 1, "monitor": "accuracy"}, ["7"]),
    ],
)
def test_the_best_and_every_nth_step_stay_beside_the_newest(
    tmp_path: Path, options: dict[str, Any], kept: list[str]
) -> None:
    assert save_losses(tmp_path, LOSSES, **options) == kept


def test_the_best_of_an_earlier_run_stays(tmp_path: Path) -> None:
    save_losses(tmp_path, {1: 0.1})
    assert save_losses(tmp_path, {2: 5.0, 3: 4.0, 4: 6.0}, max_to_keep=1, monitor="loss") == ["1", "4"]


def test_weights_that_are_not_finite_never_retire_finite_ones(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, max_to_keep=1) as checkpointer:
        for step, value in [(1, 1.0), (2, 2.0), (3, float("nan")), (4, float("inf"))]:
            checkpointer.save(step, {"w": jnp.full(3, value)})
            checkpointer.wait()
        assert checkpointer.all_steps() == [2, 4]
        checkpointer.save(5, {"w": jnp.full(3, 5.0)})
        checkpointer.wait()
        assert checkpointer.all_steps() == [5]


def test_a_damaged_step_is_neither_counted_nor_deleted(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, max_to_keep=2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, tree())
            checkpointer.wait()
        metadata = tmp_path / "2/pytree/_METADATA"
        metadata.write_bytes(metadata.read_bytes()[:-1])  # which neither directory tells
        checkpointer.save(3, tree())
        checkpointer.wait()
        assert checkpointer.all_steps() == [1, 3]
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "3"]


def test_all_and_latest_steps_are_the_durable_ones(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.all_steps() == []
        assert checkpointer.latest_step() is None
        for step in (2, 10, 9):
            checkpointer.save(step, tree(step))
        checkpointer.wait()
        assert checkpointer.all_steps() == [2, 9, 10]
        assert checkpointer.latest_step() == 10
        assert float(checkpointer.restore()["w"][0, 0]) == 10
        with stopped_writer():
            checkpointer.save(11, tree())
            assert checkpointer.latest_step() == 10


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_steps_are_kept(tmp_path: Path, keep: int) -> None:
    with Checkpointer(tmp_path, max_to_keep=keep) as checkpointer:
        for step in range(1, 8):
            checkpointer.save(step, tree(step))
    assert checkpointer.all_steps() == list(range(8 - keep, 8))
    assert sorted(os.listdir(tmp_path)) == [str(step) for step in range(8 - keep, 8)]


@pytest.mark.parametrize("keep", [None, 1])
def test_a_step_that_is_saved_again_replaces_the_older_one(tmp_path: Path, keep: int | None) -> None:
    with Checkpointer(tmp_path, max_to_keep=keep) as checkpointer:
        for value in (1, 2, 3):
            checkpointer.save(5, tree(value))
        checkpointer.wait()
        assert checkpointer.all_steps() == [5]
        assert_same(checkpointer.restore(5, tree()), tree(3))
    assert os.listdir(tmp_path) == ["5"]


def test_a_second_run_goes_on_in_the_same_directory(tmp_path: Path) -> None:
    for step in (1, 2):
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(step, tree(step))
    assert checkpointer.all_steps() == [1, 2]


def test_a_step_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointNotFound, match="holds no step that is whole"):
            checkpointer.restore()
        checkpointer.save(1, tree())
        checkpointer.wait()
        with pytest.raises(CheckpointNotFound, match=rf"{tmp_path} holds no step 2; it has \[1\]"):
            checkpointer.restore(2)


@pytest.mark.usefixtures("own_writers")
def test_a_checkpointer_may_be_used_again_after_close(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.close()
    checkpointer.close()
    checkpointer.save(1, tree())
    checkpointer.close()
    checkpointer.save(2, tree())
    checkpointer.close()
    assert checkpointer.all_steps() == [1, 2]
    assert find_writers() == []


def test_a_relative_directory_stays_the_same_after_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Checkpointer("run/deep") as checkpointer:
        monkeypatch.chdir("/")
        checkpointer.save(1, tree())
    assert os.listdir(tmp_path / "run/deep") == ["1"]


@pytest.mark.usefixtures("own_writers")
def test_the_slots_of_forgotten_checkpointers_are_freed_by_the_next_ones(tmp_path: Path) -> None:
    for step in range(10):
        Checkpointer(tmp_path).save(step, tree(step))
        assert count_slots() <= 2 * MOST_ON_THEIR_WAY
        wait_until(lambda step=step: catalog.latest_step(tmp_path) == step)  # though nobody is left to be told
    with Checkpointer(tmp_path) as last:
        last.save(10, tree(10))
    assert count_slots() == 0
    assert last.all_steps() == list(range(11))
    assert find_writers() == []


MOST_ON_THEIR_WAY = 3
"""Checkpointers of which one is in use, one is gone, and one is reported but not yet freed."""


# ------------------------------------------------------------------------------------------------- slow and busy


def test_a_wait_that_runs_out_names_the_newest_durable_step_and_the_save_goes_on(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree())
        checkpointer.wait()
        with stopped_writer():
            pending = checkpointer.save(2, tree())
            assert pending is not None
            assert not pending.done()
            checkpointer.save(3, tree())
            durable = rf"the newest that is: step 1, {tmp_path}/1$"
            with pytest.raises(SaveTimeout, match=rf"^steps 2, 3 are not durable after 0\.05 s; {durable}") as raised:
                checkpointer.wait(0.05)
            assert (raised.value.steps, raised.value.newest_step) == ((2, 3), 1)
            with pytest.raises(SaveTimeout, match=rf"^step 2 is not durable after 0 s; {durable}") as raised:
                pending.wait(0)
            assert (raised.value.steps, raised.value.newest_step) == ((2,), 1)
            assert "pending" in repr(pending)
        pending.wait(60)
        assert pending.done()
        assert repr(pending) == f"PendingSave(step=2, path='{tmp_path}/2', durable)"
        checkpointer.wait(60)
        checkpointer.wait(0)


def test_a_wait_that_runs_out_says_when_nothing_is_durable(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        with Checkpointer(tmp_path / "other") as other:  # keeps the writer running
            other.save(1, tree())
            with stopped_writer():
                checkpointer.save(1, tree())
                with pytest.raises(SaveTimeout, match=r"step 1 is not durable .*; none of this run is$") as raised:
                    checkpointer.wait(0)
        assert raised.value.newest_step is None


def test_a_save_waits_for_a_slot_and_says_how_long(tmp_path: Path) -> None:
    import threading

    with Checkpointer(tmp_path, slots=1) as checkpointer:
        checkpointer.save(1, tree())
        checkpointer.wait()
        [writer] = find_writers()
        writer.send_signal(signal.SIGSTOP)
        checkpointer.save(2, tree())
        wakening = threading.Timer(0.2, writer.send_signal, (signal.SIGCONT,))
        wakening.start()
        checkpointer.save(3, tree())
        wakening.join()
        checkpointer.wait()
    assert checkpointer.all_steps() == [1, 2, 3]
    first, second, third = checkpointer.stats
    assert first.wait_seconds == second.wait_seconds == 0
    assert 0.1 < third.wait_seconds <= third.call_seconds


def test_a_save_that_finds_no_slot_may_be_skipped_and_is_counted(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, slots=2, on_busy="skip") as checkpointer:
        checkpointer.save(1, tree())
        checkpointer.wait()
        with (
            pytest.warns(UserWarning, match="A save was skipped: all slots are on") as told,
            stopped_writer(),
        ):
            results = [checkpointer.save(step, tree(step)) for step in (2, 3, 4, 5)]
        assert len(told) == 1
        assert [result is not None for result in results] == [True, True, False, False]
        checkpointer.wait()
        checkpointer.save(6, tree())
        checkpointer.wait()
        assert checkpointer.all_steps() == [1, 2, 3, 6]
        counts = checkpointer.counts
        assert (counts.requested, counts.durable, counts.failed, counts.skipped) == (6, 4, 0, 2)
        assert [stats.step for stats in checkpointer.stats if stats.skipped] == [4, 5]


def test_the_latest_snapshot_replaces_the_oldest_that_the_writer_has_not_begun(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, slots=2, on_busy="latest") as checkpointer:
        checkpointer.save(1, tree())
        checkpointer.wait()
        with (
            pytest.warns(UserWarning, match="A save was skipped: all slots are on") as told,
            stopped_writer(),
        ):
            pending = {step: checkpointer.save(step, tree(step)) for step in (2, 3, 4, 5)}
        assert len(told) == 1
        checkpointer.wait()
        checkpointer.save(6, tree(6))
        checkpointer.wait()
        assert checkpointer.all_steps() == [1, 4, 5, 6]
        for step in (4, 5, 6):
            assert_same(checkpointer.restore(step, tree()), tree(step))
        for step in (2, 3):
            assert repr(pending[step]) == f"PendingSave(step={step}, path='{tmp_path}/{step}', replaced)"
            with pytest.raises(
                SaveReplaced, match=rf"step {step} was not saved to {tmp_path}/{step}: a newer snapshot"
            ):
                pending[step].wait()
        counts = checkpointer.counts
        assert (counts.requested, counts.durable, counts.failed, counts.skipped) == (6, 4, 0, 2)
        assert [stats.step for stats in checkpointer.stats if stats.skipped] == [2, 3]


def test_a_snapshot_that_is_being_written_is_not_replaced(tmp_path: Path) -> None:
    large = 8 << 20
    with Checkpointer(tmp_path, slots=2, on_busy="latest") as checkpointer:
        checkpointer.save(1, {"w": jnp.full((large,), 1.0)})
        wait_until(lambda: bool(catalog.leftovers(tmp_path)))
        with stopped_writer():
            has_begun = catalog.latest_step(tmp_path) is None
            for step in (2, 3):
                checkpointer.save(step, {"w": jnp.full((large,), float(step))})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            checkpointer.wait()
        assert checkpointer.all_steps() == ([1, 3] if has_begun else [1, 2, 3])
        for step in checkpointer.all_steps():
            assert (np.asarray(checkpointer.restore(step)["w"]) == step).all()


@pytest.mark.parametrize("options", [{}, {"in_process": True}, {"snapshot_mode": "device_copy"}], ids=str)
def test_of_many_saves_that_replace_each_other_none_is_torn(tmp_path: Path, options: dict[str, Any]) -> None:
    saves = 150
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with Checkpointer(tmp_path, slots=2, on_busy="latest", max_to_keep=20, **options) as checkpointer:
            for step in range(saves):
                checkpointer.save(step, {"w": jnp.full((200_000,), step), "b": jnp.full((3,), step)})
    counts = checkpointer.counts
    assert counts.skipped > 0
    assert counts.durable + counts.skipped == counts.requested == saves
    assert checkpointer.all_steps() == sorted(s.step for s in checkpointer.stats if not s.skipped)[-20:]
    for step in checkpointer.all_steps():
        restored = checkpointer.restore(step)
        assert (np.asarray(restored["w"]) == step).all()
        assert (np.asarray(restored["b"]) == step).all()


def test_the_stats_of_a_save_tell_what_it_cost(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        before = time.monotonic()
        checkpointer.save(1, {"w": jnp.ones((1000, 250))})
        checkpointer.wait()
        [stats] = checkpointer.stats
        assert stats.step == 1
        assert stats.path == f"{tmp_path}/1"
        assert stats.state_bytes == 1_000_000
        assert stats.durable_seconds is not None
        assert stats.cpu_seconds is not None
        assert 0 < stats.call_seconds < stats.durable_seconds < time.monotonic() - before
        assert stats.error is None


def test_the_wait_for_a_step_that_is_still_computed_is_told_apart_from_the_stall(tmp_path: Path) -> None:
    @jax.jit
    def train(w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 50, lambda _, x: x @ w / 1000, w)

    w = jax.block_until_ready(train(jnp.ones((500, 500))))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": w})
        checkpointer.save(2, {"w": train(w)})
    computed, dispatched = checkpointer.stats
    assert computed.compute_seconds < dispatched.compute_seconds <= dispatched.call_seconds
    assert dispatched.stall_seconds == dispatched.call_seconds - dispatched.compute_seconds


# ------------------------------------------------------------------------------------------------------ failures


def put_in_the_way(directory: Path, step: int) -> None:
    (directory / str(step)).write_text("a file")


def test_a_failed_save_is_raised_once_by_the_next_call(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree())
        checkpointer.wait()
        put_in_the_way(tmp_path, 2)
        pending = checkpointer.save(2, tree())
        assert pending is not None
        with pytest.raises(SaveFailed, match=rf"step 2 was not saved to {tmp_path}/2: .*; checkpoints saved before it"):
            checkpointer.wait()
        checkpointer.wait()
        assert "failed" in repr(pending)
        assert "a file is where" in str(pending.stats.error)
        checkpointer.save(3, tree())
        checkpointer.wait()
    assert checkpointer.all_steps() == [1, 3]


def test_a_failed_save_is_raised_by_the_next_save(tmp_path: Path) -> None:
    put_in_the_way(tmp_path, 1)
    with Checkpointer(tmp_path) as checkpointer:
        pending = checkpointer.save(1, tree())
        assert pending is not None
        while not pending.done():
            checkpointer._engine.wait_all(None)  # as `wait`, but without being told
        with pytest.raises(SaveFailed, match="step 1 was not saved"):
            checkpointer.save(2, tree())
        checkpointer.save(2, tree())
    assert checkpointer.all_steps() == [2]


def test_a_failed_save_is_raised_by_its_own_wait_and_not_again(tmp_path: Path) -> None:
    put_in_the_way(tmp_path, 1)
    with Checkpointer(tmp_path) as checkpointer:
        pending = checkpointer.save(1, tree())
        assert pending is not None
        with pytest.raises(SaveFailed, match="step 1 was not saved"):
            pending.wait()
        checkpointer.wait()


def test_each_of_several_failures_is_raised(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(0, tree())
    checkpointer.wait()
    (writer,) = find_writers()
    writer.suspend()  # or the failure of step 1 is raised by the save of step 2
    for step in (1, 2):
        put_in_the_way(tmp_path, step)
        checkpointer.save(step, tree())
    writer.resume()
    with pytest.raises(SaveFailed, match="step 1"):
        checkpointer.close()
    with pytest.raises(SaveFailed, match="step 2"):
        checkpointer.close()
    checkpointer.close()


def test_a_failed_save_may_be_a_warning(tmp_path: Path) -> None:
    put_in_the_way(tmp_path, 1)
    with Checkpointer(tmp_path, on_error="warn") as checkpointer:
        checkpointer.save(1, tree())
        with pytest.warns(RuntimeWarning, match="step 1 was not saved"):
            checkpointer.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checkpointer.save(2, tree())
            checkpointer.wait()
    assert checkpointer.all_steps() == [2]
    assert checkpointer.counts.failed == 1


def test_an_error_carries_its_number(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "run")
    checkpointer.save(1, tree())
    checkpointer.wait()
    shutil.rmtree(tmp_path / "run")
    checkpointer.save(2, tree())
    with pytest.raises(OSError, match=r"the directory to save into has vanished: '.*/run'") as raised:
        checkpointer.close()
    assert isinstance(raised.value, SaveFailed)
    assert raised.value.errno == 2
    assert not (tmp_path / "run").exists()


def test_a_directory_of_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "2").mkdir()
    (tmp_path / "2/notes.txt").write_text("mine")
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, tree())
        with pytest.raises(SaveFailed, match="a directory that is no checkpoint has the name of this step") as raised:
            checkpointer.wait()
    assert raised.value.errno == errno.EEXIST
    assert (tmp_path / "2/notes.txt").read_text() == "mine"


def test_a_directory_that_came_back_is_used_again(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, tree())
        checkpointer.wait()
        shutil.rmtree(tmp_path / "run")
        checkpointer.save(2, tree())
        with pytest.raises(SaveFailed):
            checkpointer.wait()
        (tmp_path / "run").mkdir()
        checkpointer.save(3, tree())
    assert checkpointer.all_steps() == [3]


def test_a_failure_inside_a_with_block_is_not_hidden_by_the_error_of_the_block(tmp_path: Path) -> None:
    put_in_the_way(tmp_path, 1)
    with pytest.raises(SaveFailed, match="step 1") as raised, Checkpointer(tmp_path) as checkpointer:  # noqa: PT012
        checkpointer.save(1, tree())
        raise KeyError("of the training")
    assert isinstance(raised.value.__context__, KeyError)


# --------------------------------------------------------------------------------------------------- bad arguments

BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"max_to_keep": 0}, r"max_to_keep must be None or an integer of at least 1\. Received: 0"),
    ({"keep_best": 2}, r"keep_best says what stays beside the newest: give max_to_keep too. Received: keep_best=2"),
    ({"keep_every": 0, "max_to_keep": 1}, r"keep_every must be None or an integer of at least 1. Received: 0"),
    ({"keep_best": 2, "max_to_keep": 1}, r"keep_best needs the name of a metric in monitor. Received: keep_best=2"),
    ({"mode": "auto"}, r"mode must be 'min' or 'max'. Received: 'auto'"),
    ({"max_to_keep": 1.5}, r"max_to_keep must be .* Received: 1\.5"),
    ({"slots": 0}, r"slots must be an integer of at least 1\. Received: 0"),
    ({"slots": "2"}, r"slots must be .* Received: '2'"),
    ({"on_busy": "drop"}, r"on_busy must be 'wait', 'skip' or 'latest'\. Received: 'drop'"),
    ({"on_busy": "latest", "slots": 1}, r"on_busy='latest' needs 2 slots or more: .*\. Received: 1"),
    ({"on_error": None}, r"on_error must be 'raise' or 'warn'\. Received: None"),
    ({"memory_budget": 0}, r"memory_budget must be a positive number of bytes\. Received: 0"),
    ({"memory_budget": "1GB"}, r"memory_budget must be .* Received: '1GB'"),
    ({"copy_threads": 0}, r"copy_threads must be .* Received: 0"),
    ({"copy_threads": 1000}, r"copy_threads must be .* Received: 1000"),
    ({"copy_threads": 1.5}, r"copy_threads must be .* Received: 1\.5"),
    ({"retry_seconds": -1}, r"retry_seconds must be a finite number of seconds, 0 or more\. Received: -1"),
    ({"retry_seconds": float("inf")}, r"retry_seconds must be .* Received: inf"),
    ({"retry_seconds": None}, r"retry_seconds must be .* Received: None"),
    ({"snapshot_mode": "device"}, r"snapshot_mode must be .* Received: 'device'"),
]


@pytest.mark.parametrize(("options", "text"), BAD_OPTIONS, ids=[str(options) for options, _ in BAD_OPTIONS])
def test_a_bad_option_is_refused_with_what_was_received(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Checkpointer(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", [-1, 1.5, "7", None, np.float32(3), jnp.ones(3)], ids=repr)
def test_a_bad_step_is_refused_with_what_was_received(tmp_path: Path, step: Any) -> None:
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match=r"step must be .* Received: "):
        checkpointer.save(step, tree())


@pytest.mark.parametrize("step", [0, 10**12, np.int32(3), jnp.int32(4), True])
def test_a_step_may_be_any_integer(tmp_path: Path, step: Any) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(step, tree())
        checkpointer.wait()
        assert checkpointer.all_steps() == [operator.index(step)]


@pytest.mark.parametrize("metrics", [[1.0], {"loss": "low"}, {"loss": np.ones(3)}, {"loss": None}], ids=repr)
def test_bad_metrics_are_refused_with_what_was_received(tmp_path: Path, metrics: Any) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match=r"metrics must be a dict of numbers\. Received: "):
            checkpointer.save(1, tree(), metrics=metrics)
        checkpointer.save(2, tree())
    assert checkpointer.all_steps() == [2]


def test_a_state_that_does_not_fit_the_budget_is_told_at_the_first_save(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, memory_budget=1_000_000) as checkpointer:
        with pytest.raises(BudgetExceeded, match=r"takes 4\.0 MB of host memory, the budget is 1\.0 MB"):
            checkpointer.save(1, {"w": jnp.ones((1000, 1000))})
        checkpointer.save(2, tree())  # a smaller one fits
        checkpointer.wait()
    assert checkpointer.all_steps() == [2]


def test_a_root_that_is_a_file_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"checkpoints cannot be saved here: .* this is a file"):
        Checkpointer(tmp_path / "file")


def test_the_package_offers_what_its_pages_name() -> None:
    assert offstep.Checkpointer is Checkpointer
    assert all(hasattr(offstep, name) for name in offstep.__all__ if name != "ModelCheckpoint")


def make_extra() -> dict[str, Any]:
    return {
        "iterator": {"position": 12, "seed": None, "shards": ("a", "b"), "blob": b"\0\1"},
        "random": np.random.default_rng(1).integers(0, 2**32, 624, np.uint32),
        "scale": jnp.full((2,), 0.5, jnp.bfloat16),
        "losses": [0.25, float("nan"), float("inf")],
    }


@pytest.mark.parametrize("in_process", [False, True])
def test_extra_comes_back_with_the_checkpoint(tmp_path: Path, in_process: bool) -> None:
    extra = make_extra()
    with Checkpointer(tmp_path, in_process=in_process) as checkpointer:
        checkpointer.save(1, tree(), extra=extra)
        extra["random"][:] = 0  # it was copied
        checkpointer.save(2, tree())
        checkpointer.wait()
        found, nothing = checkpointer.restore_extra(1), checkpointer.restore_extra()
    expected = make_extra()
    assert nothing == {}
    assert found["iterator"] == expected["iterator"]
    assert found["random"].tobytes() == expected["random"].tobytes()
    assert (found["scale"].dtype, found["scale"].tolist()) == (jnp.bfloat16, [0.5, 0.5])
    assert found["losses"][0] == 0.25
    assert np.isnan(found["losses"][1])
    assert set(offstep.restore(tree(0), tmp_path / "1").extra) == set(expected)
    assert_same(v1.load(tmp_path / "1", tree(0), checkpointable_name="pytree"), tree())


def test_a_damaged_extra_is_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, in_process=True) as checkpointer:
        checkpointer.save(1, tree(), extra=make_extra())
    path = tmp_path / "1/offstep-user-extra"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointDamaged, match="checksum"):
        checkpointer.restore_extra()


def test_extra_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, in_process=True) as checkpointer:
        with pytest.raises(ValueError, match=r"extra must be a dict. Received: list"):
            checkpointer.save(1, tree(), extra=[1])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="cannot be kept with a checkpoint: object"):
            checkpointer.save(1, tree(), extra={"a": object()})


def test_private_checkpoints_are_for_their_owner_only(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, private=True) as checkpointer:
        checkpointer.save(1, {"w": jnp.ones(3)})
    found = [tmp_path / "1", *(tmp_path / "1").rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in found if path.is_dir()} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in found if path.is_file()} == {0o600}
