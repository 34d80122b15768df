"""Loads, in a process without offstep, each root of a directory with stock Keras and Orbax.

Prints a JSON object: name -> what differs from the model that was saved, empty when nothing does.
"""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import orbax.checkpoint as v0
import zoo
from orbax.checkpoint import v1

GROUPS = ("trainable_variables", "non_trainable_variables", "optimizer_variables")
Arrays = list[np.ndarray]


def compare(root: Path, saved: Mapping[str, Any]) -> str:  # what test_roundtrip pickled
    model = keras.saving.load_model(root, custom_objects=zoo.CUSTOM_OBJECTS, safe_mode=False)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # as the note tells the user
    for group in GROUPS:
        variables = model.optimizer.variables if group == "optimizer_variables" else getattr(model, group)
        difference = find_difference([np.asarray(v.value) for v in variables], saved[group])
        if difference:
            return f"{group}: {difference}"
    if [layer.words for layer in zoo.find_vocabularies(model)] != saved["words"]:
        return "assets differ"
    prediction = np.asarray(model.predict(zoo.make_data()[0], verbose=0), "float32")
    if saved["prediction"] is not None and not np.array_equal(prediction, saved["prediction"]):
        return "predictions differ"
    return compare_restores(next(root.iterdir()), saved)


def find_difference(actual: Arrays, expected: Arrays) -> str:
    if len(actual) != len(expected):
        return f"{len(actual)} variables, expected {len(expected)}"
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        if (one.dtype, one.shape, one.tobytes()) != (other.dtype, other.shape, other.tobytes()):
            return f"variable {number} differs"
    return ""


def compare_restores(step: Path, saved: Mapping[str, Any]) -> str:
    """The arrays by any reader of Orbax are those of the model; their names are another matter."""
    expected = sorted_bytes([array for group in (*GROUPS, "metrics_variables") for array in saved[group]])
    readers = {
        "v1": lambda: v1.load(step, checkpointable_name="pytree"),
        "v0": lambda: v0.StandardCheckpointer().restore(step / "pytree"),
        "v0 pytree": lambda: v0.PyTreeCheckpointer().restore(step / "pytree"),
    }
    for name, read in readers.items():
        if sorted_bytes([np.asarray(leaf) for leaf in keras.tree.flatten(read())]) != expected:
            return f"Orbax {name} differs"
    return ""


def sorted_bytes(arrays: Arrays) -> list[tuple[str, tuple[int, ...], bytes]]:
    return sorted((str(array.dtype), array.shape, array.tobytes()) for array in arrays)


def main(directory: Path) -> None:
    sys.modules["offstep"] = None  # type: ignore[assignment]  # from here on it cannot be imported
    warnings.simplefilter("ignore")
    results = {}
    for path in sorted(directory.glob("*.pickle")):
        keras.utils.clear_session()
        try:
            results[path.stem] = compare(directory / path.stem, pickle.loads(path.read_bytes()))
        except Exception as error:  # noqa: BLE001  # the next model shall have its turn
            results[path.stem] = f"{type(error).__name__}: {error}"
    print(json.dumps(results))


main(Path(sys.argv[1]))
