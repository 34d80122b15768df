"""What a notebook shows of callbacks, checkpointers and the paths of checkpoints."""

from __future__ import annotations

import copy
import os
import pickle
import re
from html import unescape
from pathlib import Path

import jax.numpy as jnp
import keras
import pytest
from runs import fit, make_model
from slots import save_arrays

import offstep
from offstep import BackupAndRestore, Checkpointer, ModelCheckpoint
from offstep.cards import make_card

pytestmark = pytest.mark.usefixtures("one_writer")


def words_of(html: str | None) -> str:
    assert html is not None
    assert html.count("<div") == html.count("</div>")
    assert html.count("<span") == html.count("</span>")
    return unescape(re.sub(r"<[^>]*>", " ", html))


def test_a_callback_shows_its_saves(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "{step}", in_process=True)
    assert "saves none yet" in words_of(callback._repr_html_()).replace("  ", " ")
    fit(make_model(), [callback], epochs=2)
    words = words_of(callback._repr_html_())
    assert f"ModelCheckpoint   {tmp_path}/{{step}}" in words
    assert "2 durable" in words
    assert f"step 14, {tmp_path}/14" in words
    assert re.search(r"stall\s+[\d.]+ .s in the median, [\d.]+ .s at most", words)


def test_a_backup_shows_its_saves(tmp_path: Path) -> None:
    assert "BackupAndRestore" in words_of(BackupAndRestore(tmp_path / "b")._repr_html_())


def test_a_checkpointer_shows_its_steps(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, in_process=True) as checkpointer:
        assert "0 steps" in words_of(checkpointer._repr_html_())
        checkpointer.save(3, {"w": jnp.ones(4)})
        checkpointer.wait()
        words = words_of(checkpointer._repr_html_())
    assert "1 step, the newest 3" in words
    assert "1 durable" in words


def test_the_path_of_a_checkpoint_shows_what_it_holds(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "{step}", in_process=True)
    fit(make_model(), [callback], epochs=1)
    newest = offstep.latest(tmp_path)
    assert newest == tmp_path / "7"
    words = words_of(newest._repr_html_())  # type: ignore[union-attr]
    for expected in ("orbax_directory", "leaves", "step  7", "epoch  1", "loss", "mae"):
        assert expected in words, words
    best = offstep.best(tmp_path, "loss")
    assert best is not None
    assert words_of(best._repr_html_()) == words  # type: ignore[attr-defined]


def test_files_of_keras_are_shown_too(tmp_path: Path) -> None:
    make_model().save(tmp_path / "m.keras")
    found = offstep.latest(tmp_path)
    assert found is not None
    assert "keras_archive" in words_of(found._repr_html_())  # type: ignore[attr-defined]


def test_the_path_is_one_like_any_other(tmp_path: Path) -> None:
    save_arrays(tmp_path, 5, {("w",): jnp.ones(3)})
    found = offstep.latest(tmp_path)
    plain = tmp_path / "5"
    assert found is not None
    assert (found, hash(found), os.fspath(found), str(found)) == (plain, hash(plain), os.fspath(plain), str(plain))
    assert pickle.loads(pickle.dumps(found)) == copy.deepcopy(found) == plain
    assert isinstance(found, Path)
    assert found.parent == tmp_path
    assert found.parent._repr_html_() is None  # type: ignore[attr-defined]
    (found / "_METADATA").unlink(missing_ok=True)
    for path in sorted(found.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert found._repr_html_() is None  # type: ignore[attr-defined]


def test_words_are_no_markup() -> None:
    card = make_card("<i>", "<script>", [("<b>", "&<u>")])
    assert not re.search(r"<(i|script|b>&|u)>", card)
    assert "<script>" in words_of(card)


@pytest.fixture(autouse=True)
def names_from_the_start() -> None:
    keras.utils.clear_session()
