"""The global random generators that a training may draw from: Python's, NumPy's and Keras's."""

from __future__ import annotations

import importlib
import random
from typing import Any

import numpy as np

from offstep.attachments import Value


def read_random_states() -> dict[str, Value]:
    """Returns the states of Python's, NumPy's and Keras's global generators; on the thread that trains."""
    version, numbers, gauss = random.getstate()
    generator = _find_keras_generator()
    return {
        "python": (version, np.array(numbers, np.uint32), gauss),
        "numpy": np.random.get_state(legacy=False),
        "keras": None if generator is None else np.array(generator.state.value),
    }


def write_random_states(states: dict[str, Value]) -> None:
    """Puts back what `read_random_states` returned."""
    _write_keras(states["keras"])  # first: to make Keras's generator draws from Python's
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    np.random.set_state(states["numpy"])


def _write_keras(state: np.ndarray | None) -> None:
    try:
        module = importlib.import_module("keras.src.random.seed_generator")
        tracker = importlib.import_module("keras.src.backend.common.global_state")
        if state is None:
            tracker.set_global_attribute(module.GLOBAL_SEED_GENERATOR, None)
        else:
            module.global_seed_generator().state.assign(state)
    except (ImportError, AttributeError):
        return  # this Keras keeps it elsewhere; it is used outside of models only


def _find_keras_generator() -> Any:  # of Keras, or None while nothing has been drawn from it
    try:
        module = importlib.import_module("keras.src.random.seed_generator")
        tracker = importlib.import_module("keras.src.backend.common.global_state")
        return tracker.get_global_attribute(module.GLOBAL_SEED_GENERATOR)
    except (ImportError, AttributeError):
        return None
