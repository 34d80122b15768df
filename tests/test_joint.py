"""States that span several training processes: each writes its share, and all together commit one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import joint
import joint_trees
import numpy as np
import pytest
from orbax.checkpoint import v1

import offstep
from offstep import catalog, manifest

STEPS = [1, 2, 3]
METADATA_BYTES = 60_000


def save(count: int, directory: Path) -> list[dict[str, Any]]:
    arguments = {"max_to_keep": 2}
    return joint.run("joint_trees.py", count, directory, do="save", steps=STEPS, arguments=arguments)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("two")
    return directory, save(2, directory)


def list_expected(step: int) -> dict[str, np.ndarray]:
    names = ("replicated", "axis_0", "axis_1", "both_axes", "swapped", "partly_replicated", "replicated_over_model")
    return joint_trees.gather_expected(dict.fromkeys(names), step)


def assert_complete(directory: Path, count: int) -> None:
    """Every step that is there is whole, and nothing else is there."""
    assert catalog.list_steps(directory) == STEPS[-2:]
    assert {entry.name for entry in directory.iterdir()} == {"2", "3"}
    for step in STEPS[-2:]:
        checkpoint = directory / str(step)
        report = offstep.verify(checkpoint)
        assert report.ok, report.problems
        expected = list_expected(step)
        for name, values in expected.items():
            found = offstep.read(checkpoint, name)
            assert found.dtype == values.dtype, name
            assert found.tobytes() == values.tobytes(), name
        written = manifest.read(checkpoint)
        assert written is not None
        assert written.metrics == {"loss": step / 2}
        assert len(list((checkpoint / "pytree").glob("ocdbt.process_*"))) == count


def test_two_processes_save_whole_steps(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, told = saved
    assert [report["failures"] for report in told] == [[], []]
    assert_complete(directory, 2)


def test_what_both_hold_is_shared_out_evenly(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, told = saved
    written = [report["bytes"] for report in told]
    assert max(written) - min(written) < 0.2 * max(written)  # a chunk of 93 kB goes to one of them
    files = (path for path in (directory / "3").rglob("*") if path.is_file())
    state = sum(values.nbytes for values in list_expected(3).values())
    assert sum(path.stat().st_size for path in files) < state + METADATA_BYTES


def assert_stock_orbax_restores(directory: Path) -> None:
    """Step 3 in the directory, in one process."""
    expected = list_expected(3)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=device) for name, values in expected.items()
    }
    like |= {"host": expected["host"], "number": 0.0, "empty": v1.PLACEHOLDER}  # which stock Orbax cannot restore
    restored = v1.load(directory / "3", like, checkpointable_name="pytree")
    del like["empty"]
    for name in like:
        assert np.asarray(restored[name]).tobytes() == expected[name].tobytes(), name


def test_stock_orbax_restores_it_in_one_process(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    assert_stock_orbax_restores(saved[0])


@pytest.mark.parametrize("count", [1, 2])
def test_our_restore_puts_it_on_any_number_of_processes(count: int, saved: tuple[Path, list[dict[str, Any]]]) -> None:
    told = joint.run("joint_trees.py", count, saved[0], do="restore", steps=[3])
    assert [report["wrong"] for report in told] == [[]] * count


@pytest.mark.campaign
def test_four_processes_save_and_restore(tmp_path: Path) -> None:
    told = save(4, tmp_path)
    assert [report["failures"] for report in told] == [[]] * 4
    assert_complete(tmp_path, 4)
    for count in (1, 2, 4):
        told = joint.run("joint_trees.py", count, tmp_path, do="restore", steps=[3])
        assert [report["wrong"] for report in told] == [[]] * count
