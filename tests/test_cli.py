"""The commands on everything that a path may lead to: the right words, the right exit status, never a traceback."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from command import offstep
from runs import fit, make_model
from slots import Arrays, save_arrays

from offstep import ModelCheckpoint, ownership
from offstep.manifest import build

pytestmark = pytest.mark.usefixtures("one_writer")

COMMANDS: dict[str, tuple[str, ...]] = {
    "ls": (),
    "inspect": ("--stats",),
    "latest": (),
    "verify": (),
    "prune": ("--keep", "1", "--dry-run"),
}
OK, DIFFERENT, USAGE, NOTHING, UNSUITABLE, DAMAGED, REFUSED = range(7)

all_commands = pytest.mark.parametrize("command", COMMANDS)


def make_arrays(value: float) -> Arrays:
    return {
        ("trainable_variables", "d1", "kernel"): np.full((8, 4), value, np.float32),
        ("trainable_variables", "d1", "bias"): np.full((4,), value, ml_dtypes.bfloat16),
        ("optimizer_variables", "iteration"): np.array(int(value), np.int32),
    }


def save_steps(root: Path, losses: dict[int, float]) -> None:
    """Saves steps whose values are their numbers."""
    for step, loss in losses.items():
        path = save_arrays(root, step, make_arrays(step))
        about = {"step": step, "epoch": step, "metrics": {"val_loss": loss}}
        (path / "offstep.json").write_bytes(build(about, {}, 0))


def break_one(step: Path) -> None:
    [path] = (step / "pytree/d").iterdir()
    path.write_bytes(path.read_bytes()[:10])


def flip_bit(step: Path) -> None:
    [path] = (step / "pytree/d").iterdir()
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save_steps(tmp_path / "run", {10: 0.5, 20: 0.25, 30: 0.75, 40: math.nan})
    return tmp_path / "run"


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What others write: Orbax directories of both interfaces, and the files of Keras. Not to be changed."""
    directory = tmp_path_factory.mktemp("stock")
    tree = {"a": {"w": np.arange(12.0, dtype=np.float32).reshape(3, 4)}, "b": np.int32(3)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "standard", tree)
    with ocp.CheckpointManager(directory / "managed") as manager:
        manager.save(5, args=ocp.args.StandardSave(tree), metrics={"loss": 0.5})
    model = make_model()
    fit(model, [keras.callbacks.OrbaxCheckpoint(directory / "callback", save_freq="epoch")], epochs=1)
    for name in ("m.keras", "m.weights.h5"):
        model.save(directory / name) if name == "m.keras" else model.save_weights(directory / name)
    return directory


# --- what a path may lead to -----------------------------------------------------------------------------------------


@all_commands
def test_nothing_at_all(command: str, tmp_path: Path) -> None:
    run = offstep(command, tmp_path / "absent", *COMMANDS[command])
    assert (run.code, run.out) == (NOTHING, "")
    assert run.err == f"offstep: {tmp_path}/absent does not exist\n"


@contextmanager
def as_nobody() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["standard", "managed/5", "callback", "m.keras", "m.weights.h5"])
@pytest.mark.parametrize("command", ["ls", "inspect", "verify"])
def test_what_others_wrote(command: str, name: str, stock: Path) -> None:
    run = offstep(command, stock / name, *COMMANDS[command])
    assert (run.code, run.err) == (OK, "")
    shown = {"ls": "1 checkpoints", "inspect": "non-finite", "verify": "whole"}
    assert shown[command] in run.out


def test_the_newest_of_what_others_wrote(stock: Path) -> None:
    assert offstep("latest", stock / "managed").out == f"{stock}/managed/5\n"
    assert offstep("latest", stock / "callback").code == OK


def test_verify_says_what_has_no_checksums(stock: Path, tmp_path: Path) -> None:
    fit(make_model(), [ModelCheckpoint(tmp_path / "{step}", in_process=True)], epochs=1)
    assert "without a checksum" not in offstep("verify", tmp_path).out
    assert "without a checksum: " in offstep("verify", stock / "standard").out
    assert "without a checksum" not in offstep("verify", stock / "m.keras").out
    assert "without a checksum: m.weights.h5" in offstep("verify", stock / "m.weights.h5").out


@pytest.mark.parametrize("name", ["m.keras", "m.weights.h5"])
def test_a_truncated_file_of_keras(name: str, stock: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes((stock / name).read_bytes()[:-2000])
    assert "no: it cannot be read" in offstep("ls", tmp_path).out
    assert offstep("verify", tmp_path).code == DAMAGED
    run = offstep("inspect", tmp_path / name)
    assert run.code == DAMAGED
    assert "cannot be read as a Keras file" in run.err


def test_a_thousand_checkpoints(tmp_path: Path) -> None:
    original = save_arrays(tmp_path, 0, {("w",): np.ones(3)})
    for step in range(1, 1000):
        copy(original, tmp_path / str(step))
    found = offstep("ls", tmp_path, "--json").document["checkpoints"]
    assert [entry["step"] for entry in found] == list(range(1000))
    assert all(entry["is_whole"] for entry in found)
    assert len(offstep("prune", tmp_path, "--keep", "2", "--dry-run", "--json").document["removed"]) == 998


def copy(source: Path, target: Path) -> None:
    for directory, _, names in os.walk(source):
        place = target / Path(directory).relative_to(source)
        place.mkdir()
        for name in names:
            os.link(Path(directory, name), place / name)


# --- ls --------------------------------------------------------------------------------------------------------------


def test_ls_shows_steps_metric_best_and_damage(root: Path) -> None:
    break_one(root / "20")
    (root / "50.orbax-checkpoint-tmp-1").mkdir()
    (root / "60").mkdir()
    found = offstep("ls", root, "--json").document
    assert found["monitor"] == "val_loss"
    entries = found["checkpoints"]
    assert [entry["step"] for entry in entries] == [10, 20, 30, 40, 60]
    # Without a size in the manifest only `verify` sees a data file that is too short.
    assert [entry["is_whole"] for entry in entries] == [True, True, True, True, False]
    assert [entry["metrics"].get("val_loss") for entry in entries] == [0.5, 0.25, 0.75, "NaN", None]
    assert "never committed" in entries[4]["problem"]
    assert [entry["is_best"] for entry in entries] == [False, True, False, False, False]


def test_ls_compares_sizes_with_the_manifest(tmp_path: Path) -> None:
    fit(make_model(), [ModelCheckpoint(tmp_path / "{step}", in_process=True)], epochs=2)
    newest = tmp_path / "14"
    data = max((newest / "pytree/d").iterdir(), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    run = offstep("ls", tmp_path)
    assert "has 100 bytes, expected" in run.out
    assert offstep("verify", tmp_path).code == DAMAGED


def test_ls_shows_what_retention_would_do(root: Path) -> None:
    entries = offstep("ls", root, "--keep", "1", "--json").document["checkpoints"]
    assert {entry["step"]: entry["would_go"] for entry in entries} == {10: True, 20: False, 30: True, 40: False}
    assert offstep("ls", root, "--keep", "1").out.count("goes") == 2


def test_an_unknown_metric_is_told(root: Path) -> None:
    run = offstep("ls", root, "--monitor", "auc")
    assert (run.code, run.err) == (USAGE, "offstep: no checkpoint has the metric 'auc'; they have val_loss\n")


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_measures_values(tmp_path: Path) -> None:
    arrays: Any = {
        ("f",): np.array([1, np.nan, -3, np.inf], np.float32),
        ("h",): np.array([0.5, 1.5], ml_dtypes.bfloat16),
        ("i",): np.array([[2**40, -1]], np.int64),
        ("b",): np.array([True, False]),
        ("nan",): np.array(np.nan),
    }
    path = save_arrays(tmp_path, 1, arrays)
    found = offstep("inspect", path, "--stats", "--json").document
    numbers = {
        leaf["name"]: [leaf[key] for key in ("minimum", "maximum", "mean", "nonfinite")] for leaf in found["leaves"]
    }
    assert numbers == {
        "f": [-3.0, 1.0, -1.0, 2],
        "h": [0.5, 1.5, 1.0, 0],
        "i": [-1, 2**40, (2**40 - 1) / 2, 0],
        "b": [False, True, 0.5, 0],
        "nan": [None, None, None, 1],
    }


def test_inspect_shows_only_what_was_asked_for(root: Path) -> None:
    found = offstep("inspect", root, "trainable_variables/d1/kernel", "--json").document
    assert [leaf["name"] for leaf in found["leaves"]] == ["trainable_variables/d1/kernel"]
    assert (found["path"], found["manifest"]["step"]) == (f"{root}/40", 40)
    run = offstep("inspect", root, "typo")
    assert (run.code, run.err) == (USAGE, f"offstep: {root}/40 has no leaf below typo\n")


def test_a_damaged_newest_gives_way_and_says_so(root: Path) -> None:
    break_one(root / "40")
    run = offstep("latest", root)
    assert (run.code, run.out) == (OK, f"{root}/30\n")
    assert f"{root}/40 is passed over" in run.err


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify_names_the_leaf_and_the_checkpoint(root: Path) -> None:
    flip_bit(root / "20")
    run = offstep("verify", root, "--json")
    assert run.code == DAMAGED
    damaged = [entry for entry in run.document["checkpoints"] if not entry["ok"]]
    assert [entry["path"] for entry in damaged] == [f"{root}/20"]
    assert damaged[0]["problems"][0].startswith("pytree/trainable_variables.d1.kernel/c/0/0: expected CRC-32C ")
    assert len(damaged[0]["problems"]) == 1
    assert offstep("verify", root / "10").code == OK
    assert offstep("verify", root / "20").code == DAMAGED


def test_an_error_is_json_too(root: Path) -> None:
    run = offstep("inspect", root / "11", "--json")
    assert run.code == NOTHING
    assert run.document == {"error": {"kind": "CheckpointNotFound", "message": f"{root}/11 does not exist"}}


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"tree_metadata": 3}', b"\x00" * 50])
@pytest.mark.parametrize("name", ["pytree/_METADATA", "pytree/manifest.ocdbt"])
def test_damaged_documents_are_told(name: str, content: bytes, root: Path) -> None:
    (root / "40" / name).write_bytes(content)
    assert offstep("inspect", root / "40").code in (UNSUITABLE, DAMAGED)
    assert offstep("verify", root).code == DAMAGED
    assert offstep("latest", root).out == f"{root}/30\n"


# --- diff ------------------------------------------------------------------------------------------------------------


def test_equal_checkpoints_are_equal(root: Path, stock: Path) -> None:
    assert offstep("diff", root / "10", root / "10").code == OK
    assert offstep("diff", stock / "m.keras", stock / "m.keras", "--json").document["equal"] is True
    assert offstep("diff", stock / "standard", stock / "managed").code == OK


def test_values_are_compared_and_sorted(root: Path) -> None:
    run = offstep("diff", root / "10", root / "30", "--json")
    assert run.code == DIFFERENT
    found = [(one["name"], one["kind"], one["count"], one["max_abs"]) for one in run.document["differences"]]
    assert found == [
        ("optimizer_variables/iteration", "values", 1, 20.0),
        ("trainable_variables/d1/bias", "values", 4, 20.0),
        ("trainable_variables/d1/kernel", "values", 32, 20.0),
    ]
    assert run.document["differences"][0]["max_rel"] == pytest.approx(2 / 3)
    assert offstep("diff", root / "10", root / "30", "--atol", "20").code == OK
    assert offstep("diff", root / "10", root / "30", "--rtol", "0.6").code == DIFFERENT


def test_structure_comes_first_and_nan_equals_nan(tmp_path: Path) -> None:
    first: Any = {
        ("same",): np.array([np.nan, 1]),
        ("a",): np.ones(2),
        ("w",): np.ones(3),
        ("v",): np.array([1, np.inf]),
    }
    second: Any = {("same",): np.array([np.nan, 1]), ("b",): np.ones(2), ("w",): np.ones(4), ("v",): np.array([1.0, 2])}
    save_arrays(tmp_path, 1, first)
    save_arrays(tmp_path, 2, second)
    run = offstep("diff", tmp_path / "1", tmp_path / "2", "--json")
    found = [(one["name"], one["kind"], one["max_abs"], one["text"]) for one in run.document["differences"]]
    assert found == [
        ("a", "only in A", 0.0, "float64[2]"),
        ("b", "only in B", 0.0, "float64[2]"),
        ("w", "shape or dtype", 0.0, "float64[3] and float64[4]"),
        ("v", "values", "Infinity", ""),
    ]


def test_formats_that_name_their_leaves_differently_are_told(root: Path, stock: Path) -> None:
    run = offstep("diff", root, stock / "m.keras")
    assert run.code == DIFFERENT
    assert "name their leaves differently" in run.out


# --- prune -----------------------------------------------------------------------------------------------------------


def test_prune_keeps_the_newest_and_the_best(root: Path) -> None:
    break_one(root / "10")
    (root / "5").mkdir()
    would = offstep("prune", root, "--keep", "1", "--dry-run", "--json").document
    assert would["removed"] == [f"{root}/10", f"{root}/30"]
    assert sorted(path.name for path in root.iterdir()) == ["10", "20", "30", "40", "5"]
    run = offstep("prune", root, "--keep", "1")
    assert run.code == OK
    assert sorted(path.name for path in root.iterdir()) == ["20", "40", "5"]
    assert f"left alone {root}/5" in run.out


def test_prune_spares_multiples_and_more_of_the_best(root: Path) -> None:
    assert offstep("prune", root, "--keep", "1", "--keep-best", "2", "--json").document["removed"] == [f"{root}/30"]
    assert offstep("prune", root, "--keep", "1", "--keep-every", "10", "--json").document["removed"] == []


@pytest.mark.parametrize("suffix", ["keras", "weights.h5"])
def test_files_of_ours_are_listed_and_pruned_by_step_and_metric(suffix: str, tmp_path: Path) -> None:
    callback = ModelCheckpoint(
        tmp_path / f"{{epoch}}.{suffix}", in_process=True, save_weights_only=suffix == "weights.h5"
    )
    history = fit(make_model(), [callback], epochs=3)
    for number in (1, 2, 3):
        os.utime(tmp_path / f"{number}.{suffix}", (100 - number, 100 - number))
    listed = offstep("ls", tmp_path, "--json").document
    steps = sorted((entry["step"], entry["metrics"]["loss"], entry["format"][:5]) for entry in listed["checkpoints"])
    assert steps == [(7 * (number + 1), loss, "keras") for number, loss in enumerate(history.history["loss"])]
    assert offstep("prune", tmp_path, "--keep", "1", "--monitor", "loss").code == OK
    best = 1 + int(np.argmin(history.history["loss"]))
    assert sorted(os.listdir(tmp_path)) == sorted({f"{best}.{suffix}", f"3.{suffix}"})


@pytest.mark.filterwarnings("ignore:Keras itself writes each file:UserWarning")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of stock Keras
def test_a_legacy_file_is_looked_at_if_asked_for(tmp_path: Path) -> None:
    fit(make_model(), [ModelCheckpoint(tmp_path / "m.h5", in_process=True)], epochs=1)
    assert "model_weights/first/" in offstep("inspect", tmp_path / "m.h5").out
    assert "without a checksum" not in offstep("verify", tmp_path / "m.h5").out
    run = offstep("average", tmp_path / "m.h5", tmp_path / "m.h5", tmp_path / "mean.h5")
    assert run.code == UNSUITABLE
    assert "legacy format" in run.err
    assert offstep("ls", tmp_path).out.startswith("no checkpoint in")


def test_prune_takes_files_by_their_age(stock: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("b.keras", "c.keras", "a.keras")):
        (tmp_path / name).write_bytes((stock / "m.keras").read_bytes())
        os.utime(tmp_path / name, (number, number))
    assert offstep("prune", tmp_path, "--keep", "2").code == OK
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.keras", "c.keras"]
    run = offstep("prune", tmp_path, "--keep", "1", "--keep-every", "5")
    assert run.code == USAGE
    assert "--keep-every needs" in run.err


@pytest.mark.parametrize("folder", [".", "best"])
def test_prune_refuses_where_a_live_run_saves_unless_told_otherwise(folder: str, root: Path) -> None:
    (root / folder).mkdir(exist_ok=True)
    for path in list(root.iterdir()) if folder == "best" else []:
        if path.name.isdecimal():
            path.rename(root / "best" / path.name)
    lock = ownership.acquire(ownership.lock_path(root / folder))
    try:
        run = offstep("prune", root, "--keep", "1")
        assert run.code == REFUSED
        assert f"a live run saves to {root / folder} (process {os.getpid()} on " in run.err
        assert "Let it end, or pass --while-saving" in run.err
        assert offstep("prune", root, "--keep", "1", "--dry-run").code == OK
        assert len(list((root / folder).glob("[0-9]*"))) == 4
        assert offstep("prune", root, "--keep", "1", "--while-saving").code == OK
        assert len(list((root / folder).glob("[0-9]*"))) == 2
    finally:
        ownership.release(lock)


@pytest.mark.parametrize("keep", ["0", "-1", "x"])
def test_prune_refuses_to_keep_nothing(keep: str, root: Path) -> None:
    assert offstep("prune", root, "--keep", keep).code == USAGE
    assert len(list(root.iterdir())) == 4


def test_prune_refuses_a_single_checkpoint(root: Path) -> None:
    run = offstep("prune", root / "10", "--keep", "1")
    assert run.code == USAGE
    assert "is one checkpoint" in run.err


# --- the process -----------------------------------------------------------------------------------------------------


def test_the_module_is_the_command_and_needs_neither_keras_nor_jax(root: Path) -> None:
    script = (
        "import sys; from offstep.cli import main; "
        f"codes = [main([c, {str(root)!r}, '--json']) for c in ('ls', 'inspect', 'latest', 'verify')]; "
        "sys.exit(any(codes) or any(name in sys.modules for name in ('keras', 'jax', 'orbax')))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
    ended = subprocess.run([sys.executable, "-m", "offstep", "--version"], check=True, capture_output=True, text=True)
    assert ended.stdout.startswith("offstep ")


def test_a_reader_that_stops_early_is_no_error(root: Path) -> None:
    command = f"{sys.executable} -m offstep ls {root} | true; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("0\n", "")


def test_help_names_every_command_and_status() -> None:
    run = offstep("--help")
    assert run.code == OK
    for word in (*COMMANDS, "diff", "exit status"):
        assert word in run.out
    assert offstep("unknown").code == USAGE
