"""What README and migration page say runs, and shows what was measured."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import keras
import numpy as np
import pytest
from blocks_of_text import find_blocks
from command import offstep as run_command
from runs import assert_same, fit, make_data, make_model, read_state
from test_ocdbt import write_database

import offstep

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def run_python(code: str, directory: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.timeout(300)  # two processes with Keras, on whatever else goes on
def test_every_block_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = find_blocks(README)
    assert {block.language for block in blocks} == {"python", "sh"}
    scripts = {block.file: block.code for block in blocks if block.file}
    parts = [block.code for block in blocks if block.language == "python" and not block.file]
    # The pieces go on from the first script, as a reader's notebook would.
    out = run_python("\n".join([scripts.pop("train.py"), *parts]), tmp_path)
    assert "step 200 durable after" in out
    monkeypatch.chdir(tmp_path)
    ran = [run_line(line, scripts) for block in blocks if block.language == "sh" for line in block.code.splitlines()]
    assert "restored at step 200\n" in ran


def run_line(line: str, scripts: dict[str | None, str]) -> str:
    """Runs a line of a shell; what would change this environment is only looked at."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "python":
        [name] = arguments
        code = f"import sys\n{scripts[name]}\nassert 'offstep' not in sys.modules\n" if name in scripts else ""
        return run_python(code, Path.cwd())
    if program == "offstep":
        run = run_command(*arguments)
        assert run.code == 0, run
        return run.out
    assert program == "pip"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert arguments[0] == "install"
    assert arguments[1] in (".", *(f".[{name}]" for name in extras))
    return ""


def test_saving_changes_no_bit_of_a_training(tmp_path: Path) -> None:
    with_saves, without = make_model(), make_model()
    fit(with_saves, [offstep.ModelCheckpoint(tmp_path / "{step}", save_freq=2)])
    fit(without, [])
    assert_same(read_state(with_saves), read_state(without))


def test_every_block_of_the_migration_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = find_blocks((ROOT / "docs/migration.md").read_text())
    assert len(blocks) == 6
    names = make_names()
    for block in blocks:
        exec(compile(block.code, "migration.md", "exec"), names)
    assert {path.name for path in tmp_path.iterdir()} >= {"ckpts", "orbax", "run", "loop"}
    assert offstep.Checkpointer(tmp_path / "loop").all_steps() == [10, 20]


def make_names() -> dict[str, Any]:  # as many kinds as there are names
    """Returns what the pieces of a page take as given."""
    keras.utils.clear_session()
    inputs = keras.Input((3,), name="inputs")
    model = keras.Model(inputs, keras.layers.Dense(1, name="last")(inputs), name="small")
    model.compile("adam", "mse")
    x, y = make_data(200)

    def train_step(state: dict[str, Any], batch: float) -> dict[str, Any]:
        return {"step": state["step"] + 1, "w": state["w"] * batch}

    return {
        "os": os,
        "keras": keras,
        "offstep": offstep,
        "model": model,
        "x": x,
        "y": y,
        "state": {"step": jnp.int32(0), "w": jnp.ones(3)},
        "batches": [0.5] * 20,
        "train_step": train_step,
    }


def test_the_readme_names_every_argument_beyond_keras_s() -> None:
    parameters = inspect.signature(offstep.ModelCheckpoint.__init__).parameters.values()
    ours = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    assert [name for name in ours if f"`{name}`" not in README] == []


def test_the_page_on_formats_reads_a_directory_by_hand(tmp_path: Path) -> None:
    script = find_script("docs/formats.md")
    (tmp_path / "read_by_hand.py").write_text(script)
    many = {f"leaf{number:04}": np.int32(number) for number in range(50)}
    array = np.arange(15.0, dtype=np.float32).reshape(5, 3)
    with offstep.Checkpointer(tmp_path / "run", in_process=True) as checkpointer:
        checkpointer.save(7, {"params": {"w": array}, **many})
    for leaf, expected in (("params.w", array.tolist()), ("leaf0041", 41)):
        command = [sys.executable, "read_by_hand.py", "run/7", leaf]
        ended = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        assert json.loads(ended.stdout) == expected


def test_the_grammar_of_nodes_holds_for_a_tree_of_several_levels(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "read_by_hand"}
    exec(compile(find_script("docs/formats.md"), "formats.md", "exec"), names)
    entries = [(b"key %04d" % number, b"%d" % number) for number in range(500)]
    write_database(tmp_path, entries, b"", max_node_bytes=1000)
    assert names["read_database"](tmp_path) == {key.decode(): value for key, value in entries}


def find_script(page: str) -> str:
    """Returns the only block of a page that is a file."""
    [script] = [block.code for block in find_blocks((ROOT / page).read_text()) if block.file]
    return script


def test_the_readme_shows_the_figures_of_the_results() -> None:
    subprocess.run([sys.executable, ROOT / "benchmarks/figures.py", "--check"], check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in headings(found), target


def headings(page: Path) -> set[str]:
    """Returns the anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_document_is_in_the_index() -> None:
    index = (ROOT / "docs/index.md").read_text()
    assert all(f"({page.name})" in index for page in PAGES if page.parent.name == "docs" and page.name != "index.md")
