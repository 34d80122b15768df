"""Does in a fresh process what stock `keras.saving.load_model` does with a directory, for each pickled state.

Prints a JSON object: name -> what differs from the model that was saved, empty when nothing does.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import zoo
from keras.src.saving import saving_lib

GROUPS = ("trainable_variables", "non_trainable_variables", "optimizer_variables")


def rebuild(saved: dict[str, Any]) -> Any:  # a model
    model = saving_lib._model_from_config(
        saved["config"], custom_objects=zoo.CUSTOM_OBJECTS, compile=True, safe_mode=False
    )
    model.get_state_tree()  # stock load_model needs it to work
    model.set_state_tree(zoo.make_tree(saved["leaves"]))
    for layer in zoo.find_vocabularies(model):
        layer.words = ()
    saving_lib._load_assets_from_dict(model, zoo.make_tree(saved["assets"]) if saved["assets"] else None)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # as the notes tell the user
    return model


def compare(model: Any, saved: dict[str, Any]) -> str:  # a model; what test_keras_state pickled
    for group in GROUPS:
        variables = model.optimizer.variables if group == "optimizer_variables" else getattr(model, group)
        expected = saved["expected"][group]
        if len(variables) != len(expected):
            return f"{group}: {len(variables)} variables, expected {len(expected)}"
        for variable, array in zip(variables, expected, strict=True):
            if np.asarray(variable.value).tobytes() != array.tobytes():
                return f"{group}: {variable.path} differs"
    words = [layer.words for layer in zoo.find_vocabularies(model)]
    if words != saved["words"]:
        return f"assets: {words}, expected {saved['words']}"
    prediction = np.asarray(model(zoo.make_data()[0], training=False), "float32")
    return "" if np.array_equal(prediction, saved["prediction"]) else "predictions differ"


def main(directory: Path) -> None:
    results = {}
    for path in sorted(directory.glob("*.pickle")):
        keras.utils.clear_session()
        saved = pickle.loads(path.read_bytes())
        try:
            results[path.stem] = compare(rebuild(saved), saved)
        except Exception as error:  # noqa: BLE001  # the next model shall have its turn
            results[path.stem] = f"{type(error).__name__}: {error}"
    print(json.dumps(results))


main(Path(sys.argv[1]))
