"""The examples with stock's class and with ours: the same files, by name and by content."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import keras
import pytest
from keras_file_reader import assert_same_files

from offstep import ModelCheckpoint

pytestmark = pytest.mark.usefixtures("one_writer")

EXAMPLES = Path(__file__).parent.parent / "examples"
ROWS = 128


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    keras.utils.clear_session()


@pytest.mark.parametrize(
    ("example", "target", "names"),
    [
        ("every_improvement", "", {"weights-001-"}),
        ("best_only", "best.keras", {"best.keras"}),
        ("with_other_callbacks", "", {"best.weights.h5", "epoch-01.keras", "epoch-02.keras", "epoch-03.keras"}),
    ],
)
def test_an_example_leaves_the_files_that_stock_leaves(
    example: str, target: str, names: set[str], tmp_path: Path
) -> None:
    module = importlib.import_module(example)
    for folder, checkpoint in (("stock", keras.callbacks.ModelCheckpoint), ("ours", ModelCheckpoint)):
        (tmp_path / folder).mkdir()
        keras.utils.clear_session()  # layers are numbered through the whole process
        module.train(tmp_path / folder / target, checkpoint, epochs=3, rows=ROWS)
    found = [path.name for path in (tmp_path / "ours").iterdir()]
    assert all(any(path.startswith(name) for path in found) for name in names)
    assert_same_files(tmp_path / "ours", tmp_path / "stock")
