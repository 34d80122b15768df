"""Which variable of a model lies where in the files that Keras writes, as Keras itself says."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import jax.numpy as jnp
import keras

from offstep.keras_rebuild import find_saving_lib
from offstep.records import PathKey

Model = Any  # Keras carries no types
Variable = Any  # nor has it one class of variables for all its modes

_KINDS = ("Operation", "Layer", "Functional", "Sequential", "Metric", "Optimizer", "Loss", "Cross", "Feature")


def find_file_paths(model: Model, variables: Sequence[Variable]) -> dict[tuple[PathKey, ...], int]:
    """Returns the path of each variable's dataset in a `.weights.h5` of the model, with the number of the variable.

    Keras writes such a file, with the number of each variable in place of its value. A layer that does not save its
    variables as they are (one with merged LoRA weights, say) has no paths here.
    """
    _prime()
    with tempfile.TemporaryDirectory() as directory, keras.StatelessScope() as scope:
        for number, variable in enumerate(variables):
            scope.add_update((variable, jnp.asarray(number, "int32")))
        path = Path(directory) / "paths.weights.h5"
        model.save_weights(path)
        with h5py.File(path, "r") as file:
            return _read_numbers(file)


def _prime() -> None:
    """Lets Keras make the objects that it looks at when it saves something; a stateless scope forbids it."""
    get_skipset = getattr(find_saving_lib(), "get_attr_skipset", None)
    if get_skipset is not None:
        state = importlib.import_module("keras.src.backend.common.global_state")
        for kind in _KINDS:
            # Keras 3.15 keeps what it has found under another name than it looks for.
            state.set_global_attribute(f"saving_attr_skiplist_{kind}", get_skipset(kind))


def _read_numbers(file: h5py.File) -> dict[tuple[PathKey, ...], int]:
    found: dict[tuple[PathKey, ...], int] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.shape == () and item.dtype.kind == "i":
            found[tuple(name.split("/"))] = int(item[()])

    file.visititems(visit)
    return found
