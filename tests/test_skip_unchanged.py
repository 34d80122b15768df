"""What stays as it is gets written once: which bytes go to the disk, and what stock readers find."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import keras
import numpy as np
import psutil
import pytest
from processes import find_writers
from runs import assert_same as assert_same_state
from runs import fit, list_steps, make_data, read_state, read_step
from slots import READERS, Tree, all_readers, assert_same, open_zarr

from offstep import Checkpointer, ModelCheckpoint
from offstep.formats.base_file import BaseFile, frozen_layouts
from offstep.formats.ocdbt import BASE_FILE, OWN_FILE, SlotRange
from offstep.formats.orbax_directory import prepare
from offstep.plans import make_plan
from offstep.records import Leaf, Plan

pytestmark = pytest.mark.usefixtures("one_writer")

LARGE = 300_000  # elements; more than a page of direct I/O, and not a whole number of pages


def make_tree(step: int, *, changed: tuple[str, ...] = ()) -> Tree:
    """A state with small and large leaves; those in `changed` differ from step to step, as `adapter` always does."""
    random = np.random.default_rng(0)
    sizes = {"large": (LARGE,), "larger": (3, LARGE), "small": (5,), "smaller": (3,), "empty_ish": (1,)}
    base = {name: random.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    base |= {name: base[name] + step for name in changed}
    return {"base": base, "adapter": {"w": np.full((70, 70), step, np.float32)}, "step": np.array(step, np.int32)}


def save(checkpointer: Checkpointer, step: int, tree: Tree) -> int:
    """Saves durably and returns the bytes that were written."""
    pending = checkpointer.save(step, tree)
    checkpointer.wait()
    assert pending is not None
    assert pending.stats.written_bytes is not None
    return pending.stats.written_bytes


def base_files(step: Path) -> set[int]:
    """Returns the inodes of the data files that other checkpoints have as well."""
    return {file.stat().st_ino for file in (step / "pytree/d").iterdir() if file.stat().st_nlink > 1}


# ------------------------------------------------------------------------------------------------- what is written


def test_what_did_not_change_is_written_once(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, skip_unchanged=lambda name: name.startswith("base.")) as checkpointer:
        first = save(checkpointer, 1, make_tree(1))
        later = [save(checkpointer, step, make_tree(step)) for step in (2, 3)]
    frozen_bytes = 4 * LARGE * 4
    assert first > frozen_bytes
    assert max(later) < 70 * 70 * 4 + 50_000
    assert len(base_files(tmp_path / "1") & base_files(tmp_path / "2") & base_files(tmp_path / "3")) == 1


def test_the_count_of_written_bytes_is_the_kernels(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, skip_unchanged=True) as checkpointer:
        save(checkpointer, 1, make_tree(1))
        [writer] = find_writers()
        for step in (2, 3):
            before = psutil.Process(writer.pid).io_counters().write_chars
            counted = save(checkpointer, step, make_tree(step))
            seen = psutil.Process(writer.pid).io_counters().write_chars - before
            assert counted <= seen <= counted + 8192  # the end of a file is padded to a page, and then cut


def test_without_the_option_nothing_is_shared(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        sizes = [save(checkpointer, step, make_tree(step)) for step in (1, 2)]
    assert min(sizes) > 4 * LARGE * 4
    assert not base_files(tmp_path / "2")


def test_a_leaf_that_has_changed_once_is_written_every_time(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, skip_unchanged=True) as checkpointer:
        save(checkpointer, 1, make_tree(1))
        changed = save(checkpointer, 2, make_tree(2, changed=("large",)))
        later = save(checkpointer, 3, make_tree(2, changed=("large",)))
    large_bytes = 4 * LARGE
    assert large_bytes < changed < 2 * large_bytes
    assert large_bytes < later < 2 * large_bytes
    assert base_files(tmp_path / "1") == base_files(tmp_path / "3")


def test_everything_is_written_anew_as_often_as_asked_for(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, skip_unchanged=True, full_every=3) as checkpointer:
        sizes = [save(checkpointer, step, make_tree(1)) for step in range(1, 8)]
    assert [size > 4 * LARGE * 4 for size in sizes] == [True, False, False, True, False, False, True]
    assert not base_files(tmp_path / "1") & base_files(tmp_path / "4")
    assert base_files(tmp_path / "4") == base_files(tmp_path / "6")


def test_a_leaf_that_came_to_rest_is_in_the_next_base(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, skip_unchanged=True, full_every=3) as checkpointer:
        save(checkpointer, 1, make_tree(1, changed=("larger",)))
        sizes = [save(checkpointer, step, make_tree(5, changed=("larger",))) for step in (2, 3, 4, 5)]
    assert [size > 3 * LARGE * 4 for size in sizes] == [True, True, True, False]


def test_when_all_of_it_changes_all_of_it_is_written(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, skip_unchanged=True) as checkpointer:
        for step in (1, 2, 3):
            tree = {"a": np.full(LARGE, step, np.float32), "b": np.full(3, step, np.float32)}
            assert save(checkpointer, step, tree) > 4 * LARGE
            assert_same(checkpointer.restore(step, tree), tree)
    assert not base_files(tmp_path / "3")


# ------------------------------------------------------------------------------------------------ what is read back


@all_readers
def test_stock_readers_restore_every_step_also_after_the_older_ones_are_gone(
    tmp_path: Path, read: Callable[[Path, int], Tree]
) -> None:
    trees = {step: make_tree(step, changed=("small",) if step > 2 else ()) for step in (1, 2, 3, 4)}
    with Checkpointer(tmp_path, skip_unchanged=True, max_to_keep=2) as checkpointer:
        for step, tree in trees.items():
            save(checkpointer, step, tree)
            assert_same(read(tmp_path, step), tree)
    assert list_steps(tmp_path) == [3, 4]
    for step in (3, 4):
        assert_same(read(tmp_path, step), trees[step])
    shutil.rmtree(tmp_path / "3")
    assert_same(read(tmp_path, 4), trees[4])


def test_a_copy_of_a_checkpoint_stands_alone(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", skip_unchanged=True) as checkpointer:
        for step in (1, 2):
            save(checkpointer, step, make_tree(step))
    shutil.copytree(tmp_path / "run/2", tmp_path / "copy/2")
    shutil.rmtree(tmp_path / "run")
    assert_same(READERS["v1 load"](tmp_path / "copy", 2), make_tree(2))


def test_flipped_bits_of_the_shared_file_are_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, skip_unchanged=True) as checkpointer:
        for step in (1, 2):
            save(checkpointer, step, make_tree(step))
    [inode] = base_files(tmp_path / "2")
    shared = next(file for file in (tmp_path / "2/pytree/d").iterdir() if file.stat().st_ino == inode)
    content = bytearray(shared.read_bytes())
    content[1000] ^= 8
    shared.write_bytes(content)
    damaged = 0
    for name in make_tree(1)["base"]:
        try:
            open_zarr(tmp_path / "2/pytree", f"base.{name}").read().result()
        except ValueError:
            damaged += 1
    assert damaged == 1


def test_the_manifest_names_the_linked_file_too(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, skip_unchanged=True) as checkpointer:
        for step in (1, 2):
            save(checkpointer, step, make_tree(step))
    sizes = json.loads((tmp_path / "2/offstep.json").read_text())["files"]
    for file in (tmp_path / "2/pytree/d").iterdir():
        assert str(file.relative_to(tmp_path / "2")) in sizes


# -------------------------------------------------------------------------------------------- what gets in the way


def test_a_shared_file_that_was_deleted_is_written_again(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, skip_unchanged=True) as checkpointer:
        save(checkpointer, 1, make_tree(1))
        shutil.rmtree(tmp_path / "1")
        assert save(checkpointer, 2, make_tree(2)) > 4 * LARGE * 4
        assert save(checkpointer, 3, make_tree(3)) < LARGE
    assert_same(READERS["v1 load"](tmp_path, 2), make_tree(2))


def test_another_file_in_its_place_is_not_linked(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, skip_unchanged=True) as checkpointer:
        save(checkpointer, 1, make_tree(1))
        for file in (tmp_path / "1/pytree/d").iterdir():
            content = file.read_bytes()
            file.unlink()
            file.write_bytes(content)
        assert save(checkpointer, 2, make_tree(2)) > 4 * LARGE * 4
    assert_same(READERS["v1 load"](tmp_path, 2), make_tree(2))


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_a_directory_on_another_file_system_gets_a_file_of_its_own(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm") / f"offstep-test-{os.getpid()}"
    if elsewhere.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("both are one file system")
    (tmp_path / "run").mkdir()
    elsewhere.mkdir()
    try:
        model = make_frozen_model()
        callback = ModelCheckpoint(tmp_path / "run/{epoch}/{step}", skip_unchanged=True)
        (tmp_path / "run/2").symlink_to(elsewhere)
        fit(model, [callback], x=make_data()[0], y=make_data()[1], epochs=3)
        counts = [stats.written_bytes for stats in callback.stats]
        assert [count > FROZEN_BYTES for count in counts if count] == [True, True, True]
        assert_same_state(read_step(tmp_path / "run/3/3"), read_state(model))
    finally:
        shutil.rmtree(elsewhere)


def test_a_step_that_is_saved_again_keeps_the_shared_file(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, skip_unchanged=True) as checkpointer:
        save(checkpointer, 1, make_tree(1))
        assert save(checkpointer, 1, make_tree(2)) < LARGE
        assert save(checkpointer, 1, make_tree(3)) < LARGE
    assert_same(READERS["v1 load"](tmp_path, 1), make_tree(3))


def test_a_new_writer_writes_everything_anew(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, skip_unchanged=True) as checkpointer:
        save(checkpointer, 1, make_tree(1))
        [writer] = find_writers()
        writer.kill()
        assert save(checkpointer, 2, make_tree(2)) > 4 * LARGE * 4
        assert save(checkpointer, 3, make_tree(3)) < LARGE
    assert_same(READERS["v1 load"](tmp_path, 3), make_tree(3))


def test_a_thread_writes_the_same(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, skip_unchanged=True, in_process=True) as checkpointer:
        sizes = [save(checkpointer, step, make_tree(step)) for step in (1, 2)]
    assert sizes[0] > 4 * LARGE * 4 > sizes[1]
    assert_same(READERS["v1 load"](tmp_path, 2), make_tree(2))


@pytest.mark.parametrize("full_every", [0, -1, 1.5, "2"])
def test_a_bad_full_every_is_refused(tmp_path: Path, full_every: Any) -> None:
    for make in (lambda **options: Checkpointer(tmp_path, **options), lambda **o: ModelCheckpoint("a/{step}", **o)):
        with pytest.raises(ValueError, match=f"full_every must be .* Received: {full_every!r}"):
            make(skip_unchanged=True, full_every=full_every)


def test_full_every_alone_is_refused(tmp_path: Path) -> None:
    for make in (lambda **options: Checkpointer(tmp_path, **options), lambda **o: ModelCheckpoint("a/{step}", **o)):
        with pytest.raises(ValueError, match=r"full_every is for skip_unchanged only. Received: 3"):
            make(full_every=3)


# ------------------------------------------------------------------------------------------------------ with Keras

WIDTH = 200
FROZEN_BYTES = 2 * WIDTH * WIDTH * 4


def make_frozen_model() -> Any:
    """A model of frozen layers, with a BatchNormalization whose statistics change all the same, and a trained head."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(3)
    inputs = x = keras.layers.Input((3,), name="inputs")
    for name in ("first", "second", "third"):
        x = keras.layers.Dense(WIDTH, name=name, trainable=False)(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Dropout(0.1, name="dropout")(x)
    model = keras.Model(inputs, keras.layers.Dense(1, name="head")(x))
    model.compile("adam", "mse")
    return model


def test_keras_restores_a_model_whose_frozen_weights_were_written_once(tmp_path: Path) -> None:
    model = make_frozen_model()
    callback = ModelCheckpoint(tmp_path / "{step}", save_freq=2, max_to_keep=2, skip_unchanged=True)
    fit(model, [callback], x=make_data()[0], y=make_data()[1], epochs=2, batch_size=2)
    first, *later = [stats.written_bytes for stats in callback.stats]
    assert first is not None
    assert first > FROZEN_BYTES > max(count for count in later if count is not None)
    assert_same_state(read_step(tmp_path / "14"), read_state(model))
    keras.utils.clear_session()
    restored = keras.saving.load_model(tmp_path)
    assert_same_state(read_state(restored), read_state(model))
    assert np.array_equal(restored.predict(make_data()[0], verbose=0), model.predict(make_data()[0], verbose=0))


def test_weights_that_are_frozen_in_the_middle_of_training_are_saved_right(tmp_path: Path) -> None:
    model = make_frozen_model()
    for layer in model.layers:
        layer.trainable = True
    model.compile("adam", "mse")
    callback = ModelCheckpoint(tmp_path / "{step}", skip_unchanged=True)
    fit(model, [callback], x=make_data()[0], y=make_data()[1], epochs=2)
    model.get_layer("second").trainable = False
    model.compile("adam", "mse")
    fit(model, [callback], x=make_data()[0], y=make_data()[1], epochs=2)
    newest = max(list_steps(tmp_path))
    assert_same_state(read_step(tmp_path / str(newest)), read_state(model))


# -------------------------------------------------------------------------------------------- the split by itself


def plan_of(sizes: dict[str, int], frozen: set[str]) -> Plan:
    return make_plan(
        Leaf((name,), (size,), "uint8", shard_shape=(size,), is_frozen=name in frozen) for name, size in sizes.items()
    )


def fill(plan: Plan, contents: dict[str, int]) -> bytearray:
    """A slot whose leaves hold a byte each, with a stand-in for their checksums."""
    slot = bytearray(plan.slot_bytes)
    for layout in plan.leaves:
        value = contents[layout.leaf.name]
        for offset, size in layout.chunk_ranges():
            slot[offset : offset + size] = bytes([value]) * size
    return slot


SIZES = {"a": 10, "b": 100_000, "c": 5, "d": 70_000, "e": 20_000_000, "f": 3}


def test_frozen_leaves_lie_behind_the_others_and_large_ones_in_whole_pages() -> None:
    plan = plan_of(SIZES, {"b", "c", "e"})
    at = {layout.leaf.name: layout for layout in plan.leaves}
    assert [layout.leaf.name for layout in plan.leaves] == list(SIZES)
    assert plan.frozen_offset == at["b"].offset
    assert max(at[name].end for name in "adf") <= plan.frozen_offset
    assert not [name for name in "be" if at[name].offset % 4096]
    assert max(at["b"].end, at["e"].end) <= at["c"].offset
    taken = sorted((layout.offset, layout.end) for layout in plan.leaves)
    assert all(end <= start for (_, end), (start, _) in pairwise(taken))
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_without_frozen_leaves_is_as_it_was() -> None:
    plan = plan_of(SIZES, set())
    assert [layout.offset for layout in plan.leaves][:3] == [0, 64, 64 + 100_032]
    assert plan.frozen_offset == plan.slot_bytes


@pytest.mark.parametrize("frozen", [{"b"}, {"b", "c"}, {"c", "f"}, set(SIZES), {"a", "e", "d"}])
def test_every_byte_lies_where_the_entries_say_through_any_history(frozen: set[str]) -> None:
    plan = plan_of(SIZES, frozen)
    base_file = BaseFile(plan)
    base = b""
    history: list[dict[str, int]] = [dict.fromkeys(SIZES, 1)] * 2
    for step, name in enumerate(["c", "e", "b", "b", "a", "f", "d"], 2):
        history.append(history[-1] | {name: step})
    history += [history[-1]] * 3
    for number, contents in enumerate(history):
        slot = fill(plan, contents)
        split = base_file.split(memoryview(slot), full_every=6)
        own = b"".join(split.pieces(memoryview(slot), OWN_FILE))
        if not split.is_linked:
            base = b"".join(split.pieces(memoryview(slot), BASE_FILE))
        assert len(own) == split.own_bytes
        ranges = {layout.leaf.name: range_ for layout in plan.leaves for range_ in layout.chunk_ranges()}
        entries = [(name.encode(), SlotRange(*range_)) for name, range_ in ranges.items()]
        for key, value in split.move(entries):
            assert isinstance(value, SlotRange)
            found = (own, base)[value.file][value.offset : value.offset + value.size]
            assert found == bytes([contents[key.decode()]]) * value.size, (number, key)
        base_file.remember(split, None)


def test_the_pieces_written_without_a_copy_come_first() -> None:
    plan = plan_of(SIZES, {"b", "c", "d", "f"})
    base_file = BaseFile(plan)
    contents = dict.fromkeys(SIZES, 1)
    for name, value in (("", 1), ("c", 2), ("d", 3)):
        slot = fill(plan, contents | ({name: value} if name else {}))
        split = base_file.split(memoryview(slot))
        base_file.remember(split, None)
    own = [run for run in split.runs if run.file == OWN_FILE]
    assert [run.slot_offset % 4096 or run.size % 4096 for run in own][:2] == [0, 0]
    assert sum(run.size for run in own) < 20_400_000


def test_leaves_without_elements_may_be_frozen() -> None:
    leaves = [Leaf(("a",), (0,), "float32", is_frozen=True), Leaf(("b",), (3,), "float32")]
    assert prepare(make_plan(leaves), None).base is None
    leaves.append(Leaf(("c",), (3,), "float32", is_frozen=True))
    plan = make_plan(leaves)
    assert [layout.leaf.name for layout in frozen_layouts(plan)] == ["c"]
    assert BaseFile(plan).split(memoryview(bytearray(plan.slot_bytes))).own_bytes == plan.leaves[2].offset
