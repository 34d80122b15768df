"""The newest and the best valid checkpoint of a directory, whatever the format."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from runs import fit, make_model
from slots import save_arrays

import offstep
from offstep import Checkpointer, ModelCheckpoint
from offstep.manifest import build

pytestmark = pytest.mark.usefixtures("one_writer")


def save_steps(root: Path, metrics: dict[int, float | None]) -> None:
    for step, value in metrics.items():
        path = save_arrays(root, step, {("w",): np.full(3, step)})
        about = {"step": step, "metrics": {} if value is None else {"val_loss": value, "val_accuracy": -value}}
        (path / "offstep.json").write_bytes(build(about, {}, 0))


def truncate(step: Path) -> None:
    [path] = (step / "pytree/d").iterdir()
    path.write_bytes(path.read_bytes()[:10])


def test_an_empty_or_absent_directory_has_none(tmp_path: Path) -> None:
    assert offstep.latest(tmp_path) is None
    assert offstep.latest(tmp_path / "absent") is None
    assert offstep.best(tmp_path) is None


def test_the_greatest_step_is_the_latest(tmp_path: Path) -> None:
    save_steps(tmp_path, {9: None, 10: None, 2: None})
    (tmp_path / "11.orbax-checkpoint-tmp-1").mkdir()
    assert offstep.latest(tmp_path) == tmp_path / "10"
    assert offstep.latest(str(tmp_path)) == tmp_path / "10"


def test_a_damaged_newest_is_passed_over_aloud(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: None, 2: None})
    truncate(tmp_path / "2")
    with pytest.warns(RuntimeWarning, match=r"2 is passed over: .* is truncated"):
        assert offstep.latest(tmp_path) == tmp_path / "1"


def test_checksums_count_on_request(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: None, 2: None})
    [path] = (tmp_path / "2/pytree/d").iterdir()
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    assert offstep.latest(tmp_path) == tmp_path / "2"
    with pytest.warns(RuntimeWarning, match=r"2 is passed over: w: its checksum is wrong"):
        assert offstep.latest(tmp_path, verify=True) == tmp_path / "1"


def test_files_of_keras_count_by_their_time(tmp_path: Path) -> None:
    model = make_model()
    for number, name in enumerate(("b.keras", "a.weights.h5", "c.keras")):
        model.save_weights(tmp_path / name) if name.endswith("h5") else model.save(tmp_path / name)
        os.utime(tmp_path / name, (number, number))
    assert offstep.latest(tmp_path) == tmp_path / "c.keras"
    (tmp_path / "c.keras").write_bytes(b"torn")
    with pytest.warns(RuntimeWarning, match=r"c.keras is passed over"):
        assert offstep.latest(tmp_path) == tmp_path / "a.weights.h5"


@pytest.mark.parametrize("name", ["{epoch}.weights.h5", "{epoch}.keras"])
def test_files_of_one_run_count_in_their_order_not_by_their_time(tmp_path: Path, name: str) -> None:
    options = {"save_weights_only": name.endswith("h5"), "in_process": True}
    fit(make_model(), [ModelCheckpoint(tmp_path / name, **options)], epochs=3)
    for epoch in (1, 2, 3):  # as a copy leaves them
        os.utime(tmp_path / name.format(epoch=epoch), (4 - epoch, 4 - epoch))
    assert offstep.latest(tmp_path) == tmp_path / name.format(epoch=3)
    (tmp_path / name.format(epoch=3)).write_bytes(b"torn")
    os.utime(tmp_path / name.format(epoch=3), (0, 0))
    assert offstep.latest(tmp_path) == tmp_path / name.format(epoch=2)
    # Of fewer steps, but newer.
    fit(make_model(), [ModelCheckpoint(tmp_path / f"new-{name}", **options)], epochs=1)
    assert offstep.latest(tmp_path) == tmp_path / f"new-{name}".format(epoch=1)


def test_directories_of_steps_inside_are_found(tmp_path: Path) -> None:
    fit(make_model(), [ModelCheckpoint(tmp_path / "{epoch}-{loss:.2f}", in_process=True)], epochs=2)
    newest = offstep.latest(tmp_path)
    assert newest is not None
    assert (newest.name, newest.parent.name[:2]) == ("14", "2-")


def test_the_best_is_chosen_by_its_metric(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: 0.5, 2: 0.25, 3: float("nan"), 4: 0.25, 5: None, 6: 0.75})
    assert offstep.best(tmp_path) == tmp_path / "4"
    assert offstep.best(tmp_path, mode="max") == tmp_path / "6"
    assert offstep.best(tmp_path, monitor="val_accuracy") == tmp_path / "4"


def test_a_damaged_best_gives_way(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: 0.5, 2: 0.25})
    truncate(tmp_path / "2")
    with pytest.warns(RuntimeWarning, match="2 is passed over"):
        assert offstep.best(tmp_path) == tmp_path / "1"


def test_a_metric_that_nobody_has_is_told(tmp_path: Path) -> None:
    save_steps(tmp_path, {1: 0.5})
    with pytest.raises(
        ValueError, match=r"none of the 1 checkpoints .* 'auc'; they have \['val_accuracy', 'val_loss'\]"
    ):
        offstep.best(tmp_path, monitor="auc")
    with pytest.raises(ValueError, match=r"mode must be 'auto', 'min' or 'max'. Received: 'up'"):
        offstep.best(tmp_path, mode="up")  # type: ignore[arg-type]


def test_metrics_of_a_checkpointer_count(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, in_process=True) as checkpointer:
        for step, loss in ((1, 0.5), (2, 0.1), (3, 0.3)):
            checkpointer.save(step, {"w": np.ones(2)}, metrics={"val_loss": loss})
    assert offstep.best(tmp_path) == tmp_path / "2"
    assert offstep.latest(tmp_path) == tmp_path / "3"
