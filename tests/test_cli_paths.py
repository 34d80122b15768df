"""Every command on everything that its path may lead to: clear words, an exit status for scripts, no traceback."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from command import offstep
from runs import make_model
from test_cli import as_nobody, break_one, save_steps

OK, USAGE, NOTHING, UNSUITABLE, DAMAGED, REFUSED = 0, 2, 3, 4, 5, 6

Command = Callable[[Path, Path], list[str | Path]]  # what it is given, a directory for results → arguments
COMMANDS: dict[str, Command] = {
    "ls": lambda path, _: ["ls", path],
    "inspect": lambda path, _: ["inspect", path, "--stats"],
    "latest": lambda path, _: ["latest", path],
    "verify": lambda path, _: ["verify", path],
    "prune": lambda path, _: ["prune", path, "--keep", "1", "--dry-run"],
    "diff": lambda path, _: ["diff", path, path],
    "export": lambda path, results: ["export", path, results / "out.npz"],
    "average": lambda path, results: ["average", path, path, results / f"out{''.join(path.suffixes)}"],
    "average --newest": lambda path, results: ["average", path, results / "out", "--newest", "2"],
}
_LISTED = {"ls": OK, "prune": OK}  # commands that nothing to list is no fault for
_SINGLE = {"prune": USAGE, "average --newest": USAGE}  # one checkpoint where several are wanted
CODES: dict[str, tuple[int, dict[str, int]]] = {
    "absent": (NOTHING, {}),
    "empty": (NOTHING, _LISTED | {"average --newest": USAGE}),
    "other": (NOTHING, _LISTED | {"average --newest": USAGE}),
    "notes.txt": (UNSUITABLE, {}),
    "broken": (NOTHING, _LISTED | {"verify": DAMAGED, "average --newest": USAGE}),
    "gutted": (DAMAGED, {"ls": OK} | _SINGLE),
    "truncated.keras": (DAMAGED, {"ls": OK} | _SINGLE),
    "truncated.weights.h5": (DAMAGED, {"ls": OK} | _SINGLE),
    "noise.keras": (DAMAGED, {"ls": OK} | _SINGLE),
    "nothing.weights.h5": (DAMAGED, {"ls": OK} | _SINGLE),
    "stock": (OK, _SINGLE),
    "stock.keras": (OK, _SINGLE),
    "stock.weights.h5": (OK, _SINGLE),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One path for each key of `CODES` but "absent". Not to be changed."""
    root = tmp_path_factory.mktemp("places")
    (root / "empty").mkdir()
    (root / "other/more").mkdir(parents=True)
    for path in (root / "notes.txt", root / "other/notes.txt"):
        path.write_text("hello")
    save_steps(root / "broken", {10: 0.5})
    break_one(root / "broken/10")
    save_steps(root / "steps", {10: 0.5})
    shutil.rmtree(root / "steps/10/pytree/d")
    (root / "steps/10").rename(root / "gutted")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(root / "stock", {"w": np.ones(3)})
    model = make_model()
    model.save(root / "stock.keras")
    model.save_weights(root / "stock.weights.h5")
    for suffix in (".keras", ".weights.h5"):
        (root / f"truncated{suffix}").write_bytes((root / f"stock{suffix}").read_bytes()[:-2000])
    (root / "noise.keras").write_bytes(np.random.default_rng(1).bytes(3000))
    (root / "nothing.weights.h5").touch()
    return root


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", CODES)
def test_a_command_says_what_it_has_found(place: str, command: str, places: Path, tmp_path: Path) -> None:
    usual, others = CODES[place]
    run = offstep(*COMMANDS[command](places / place, tmp_path))
    assert run.code == others.get(command, usual), run
    said = run.out if run.code in (OK, DAMAGED) and run.out else run.err
    assert place in said or "checkpoint" in said, run
    assert all(line.startswith("offstep: ") for line in run.err.splitlines()), run.err
    if run.code not in (OK, DAMAGED):
        assert run.out == ""
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["absent", "empty", "notes.txt", "gutted", "stock"])
def test_a_command_says_it_in_json(place: str, command: str, places: Path, tmp_path: Path) -> None:
    usual, others = CODES[place]
    run = offstep(*COMMANDS[command](places / place, tmp_path), "--json")
    assert run.code == others.get(command, usual)
    found = run.document
    assert isinstance(found, dict)
    if not run.code:
        assert "error" not in found
    elif command != "verify":
        assert set(found["error"]) == {"kind", "message"}


@pytest.mark.parametrize("command", [*COMMANDS, "doctor", "bench"])
@pytest.mark.parametrize("name", ["directory", "file.keras"])
def test_what_may_not_be_read_is_told(name: str, command: str, places: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    path.mkdir() if name == "directory" else shutil.copy(places / "stock.keras", path)
    arguments = COMMANDS[command](path, tmp_path) if command in COMMANDS else [command, path]
    path.chmod(0)
    try:
        with as_nobody():
            run = offstep(*arguments)
    finally:
        path.chmod(0o755)
    assert run.code == REFUSED, run
    assert run.err.startswith(("offstep: Permission denied: ", f"offstep: {command} needs a directory that exists: "))
    assert run.out == ""


def test_a_checkpoint_is_its_own_newest_one(places: Path) -> None:
    for name in ("stock", "stock.keras", "stock.weights.h5"):
        assert offstep("latest", places / name).out == f"{places / name}\n"


def test_an_average_takes_the_newest_of_each_directory(tmp_path: Path) -> None:
    save_steps(tmp_path / "a", {1: 0.5, 3: 0.5})
    save_steps(tmp_path / "b", {5: 0.5})
    run = offstep("average", tmp_path / "a", tmp_path / "b", tmp_path / "mean", "--json")
    assert run.document["averaged"] == [f"{tmp_path}/a/3", f"{tmp_path}/b/5"]
    stats = offstep("inspect", tmp_path / "mean", "trainable_variables/d1/kernel", "--stats", "--json").document
    assert stats["leaves"][0]["mean"] == 4.0
