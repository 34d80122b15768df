"""Restores what is newest in a directory by the means of whoever saved it, as a training that goes on would.

Prints `restored STEP` if all values are those of that step, `wrong WHAT`, or ends with the error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from model import Shape, Weights, expect, find_difference, make_model, read_step, read_weights
from trainee import say


def main(arguments: dict[str, Any]) -> None:
    """Restores; `arguments` are `peer`, `directory` and `shape`."""
    shape = Shape(**arguments["shape"])
    weights = RESTORERS[arguments["peer"]](Path(arguments["directory"]), shape)
    step = read_step(weights)
    difference = "of no step" if step is None else find_difference(weights, shape, step)
    if difference is None:
        say("restored", step)
    else:
        say("wrong", difference)


def _restore_model(directory: Path, shape: Shape) -> Weights:
    import offstep

    model = make_model(shape)
    offstep.restore(model, directory)
    return read_weights(model)


def _restore_tree(directory: Path, shape: Shape) -> Weights:
    from offstep import Checkpointer

    with Checkpointer(directory) as checkpointer:
        tree: Weights = checkpointer.restore()
    return tree


def _load_model(directory: Path, shape: Shape) -> Weights:
    import keras

    return read_weights(keras.saving.load_model(directory))


def _restore_managed(directory: Path, shape: Shape) -> Weights:
    import orbax.checkpoint as ocp

    state = expect(shape, 0)
    like = {layer: {name: np.zeros_like(array) for name, array in row.items()} for layer, row in state.items()}
    with ocp.CheckpointManager(directory) as manager:
        tree: Weights = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))
    return tree


RESTORERS: dict[str, Callable[[Path, Shape], Weights]] = {
    "offstep": _restore_model,
    "offstep_keras": _restore_model,
    "offstep_weights": _restore_model,
    "offstep_tree": _restore_tree,
    "orbax_checkpoint": _load_model,
    "orbax_manager": _restore_managed,
}
