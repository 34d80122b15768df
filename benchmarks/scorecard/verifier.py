"""Reads checkpoints back with stock Keras and Orbax only, in a process of its own.

It answers each line of JSON on stdin, a `Question`, with one line of JSON on stdout: what there is, and whether its
values are those of its step.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from functools import cache
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
        question = Question(**json.loads(line))
        assert "offstep" not in sys.modules, "stock readers only"
        found = look_at_newest(question) if question.only_newest else look(question)
        print(json.dumps([asdict(each) for each in found]), file=answers, flush=True)


@dataclass(frozen=True)
class Question:
    """What there is to read.

    Attributes:
        reader: Key of `READERS`.
        directory: Where.
        file: The one file; `None` where each step has a name of its own.
        suffix: Of these names.
        shape: Of the model, as JSON.
        only_newest: Read no other step.
    """

    reader: str
    directory: str
    file: str | None
    suffix: str
    shape: dict[str, int]
    only_newest: bool

    def examine(self, step: int | None) -> Found:
        """Reads the one file, or a step."""
        path = Path(self.directory, f"{step}{self.suffix}" if self.file is None else self.file)
        return examine(self.reader, path, step, Shape(**self.shape))

    def list_steps(self) -> list[int]:
        """Returns the steps that have a name."""
        names = (name.removesuffix(self.suffix) for name in os.listdir(self.directory) if name.endswith(self.suffix))
        return sorted(int(name) for name in names if name.isdecimal())


def look(question: Question) -> list[Found]:
    """Reads every checkpoint of a directory, or the one file."""
    if question.file is not None:
        return [question.examine(None)] if Path(question.directory, question.file).exists() else []
    return [question.examine(step) for step in question.list_steps()]


def look_at_newest(question: Question) -> list[Found]:
    """Reads the newest checkpoint while others are being saved: one that goes away meanwhile is not the newest."""
    while True:
        steps: list[int | None] = [None] if question.file is not None else [*question.list_steps()]
        if not steps:
            return []
        found = question.examine(steps[-1])
        if found.state != "error" or question.file is not None or steps[-1] in question.list_steps():
            return [found]


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
    model = _make_model_once(shape)
    model.load_weights(path)
    return read_weights(model), None


@cache
def _make_model_once(shape: Shape) -> Any:  # Keras carries no types
    return make_model(shape)


READERS = {
    "keras_directory": _read_keras_directory,
    "tree_directory": _read_tree_directory,
    "manager": _read_manager,
    "keras": _read_keras,
    "weights": _read_weights_file,
}
