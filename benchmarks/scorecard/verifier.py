"""Reads checkpoints back with stock Keras and Orbax only, in a process of its own.

It answers each line of JSON on stdin (`reader`, `directory`, `shape`, and `file` where there is one) with one line of
JSON on stdout: what there is, and whether its values are those of its step.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from model import Shape, Weights, find_difference, make_model, read_step, read_weights
from oracle import Found


def main(_: dict[str, Any]) -> None:
    """Serves until stdin ends."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints
    for line in sys.stdin:
        question = json.loads(line)
        assert "offstep" not in sys.modules, "stock readers only"
        shape = Shape(**question["shape"])
        found = look(question["reader"], Path(question["directory"]), question["file"], shape)
        print(json.dumps([asdict(each) for each in found]), file=answers, flush=True)


def look(reader: str, directory: Path, file: str | None, shape: Shape) -> list[Found]:
    """Reads every checkpoint of a directory, or the one file."""
    if file is not None:
        path = directory / file
        return [examine(reader, path, None, shape)] if path.exists() else []
    steps = sorted(int(entry.name) for entry in directory.glob("*") if entry.name.isdecimal())
    return [examine(reader, directory / str(step), step, shape) for step in steps]


def examine(reader: str, path: Path, step: int | None, shape: Shape) -> Found:
    """Reads one checkpoint; `step` is the one that its name says."""
    try:
        weights, count = READERS[reader](path, shape)
    except Exception as error:  # noqa: BLE001  whatever the reader's error is, it is one
        return Found(path.name, step, "error", f"{type(error).__name__}: {str(error)[:200]}")
    says = read_step(weights)
    expected = says if step is None else step
    if expected is None:
        return Found(path.name, None, "wrong", "the values are of no step")
    difference = find_difference(weights, shape, expected)
    if difference is None and count is not None and count != expected:
        difference = f"it counts {count} iterations"
    return Found(path.name, expected, "wrong" if difference else "equal", difference or "")


def _read_keras_directory(path: Path, shape: Shape) -> tuple[Weights, int | None]:
    from orbax.checkpoint import v1

    tree = v1.load(path, checkpointable_name="pytree")
    weights = {layer: dict(variables) for layer, variables in tree["trainable_variables"].items()}
    count = next(value for name, value in _flatten(tree["optimizer_variables"]) if name.endswith("iteration"))
    return weights, int(np.asarray(count))


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    return [pair for key, value in tree.items() for pair in _flatten(value, f"{prefix}.{key}")]


def _read_tree_directory(path: Path, shape: Shape) -> tuple[Weights, int | None]:
    from orbax.checkpoint import v1

    return v1.load(path, checkpointable_name="pytree"), None


def _read_manager(path: Path, shape: Shape) -> tuple[Weights, int | None]:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path / "default"), None


def _read_keras(path: Path, shape: Shape) -> tuple[Weights, int | None]:
    import keras

    model = keras.saving.load_model(path)
    return read_weights(model), int(np.asarray(model.optimizer.iterations))


def _read_weights_file(path: Path, shape: Shape) -> tuple[Weights, int | None]:
    model = make_model(shape)
    model.load_weights(path)
    return read_weights(model), None


READERS = {
    "keras_directory": _read_keras_directory,
    "tree_directory": _read_tree_directory,
    "manager": _read_manager,
    "keras": _read_keras,
    "weights": _read_weights_file,
}
