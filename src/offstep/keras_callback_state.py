"""The state of the callbacks of a `fit`: what they would forget if the training were started again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from offstep import fields
from offstep.attachments import Attachment, Value, pack
from offstep.keras_fit import AfterAll

Callback = Any  # Keras carries no types

_OF_KERAS = ("model", "_model", "params", "validation_data")
_LARGE_BYTES = 1 << 20
_OPERATOR = "monitor_op"


class CallbackStates:
    """Reads and puts back the states of all callbacks of one list.

    A callback with `get_state()` and `set_state(state)` says itself what its state is: numbers, texts, arrays, and
    lists, tuples and dicts of them. Of any other the plain fields are taken that have changed since training began.

    Args:
        callbacks: All of them, right after `on_train_begin`.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = [
            each for each in callbacks if not isinstance(each, (AfterAll, keras.callbacks.ProgbarLogger))
        ]
        self._names = _number_names(self._callbacks)
        self._baselines = [fields.copy_fields(_read(each)) for each in self._callbacks]
        self._large: dict[str, tuple[bytes, Attachment]] = {}

    def read(self) -> tuple[dict[str, Value], dict[str, Attachment]]:
        """Returns the states by callback, and apart from them what is large and seldom changes, by `callback.field`."""
        states, large = {}, {}
        for name, callback, baseline in zip(self._names, self._callbacks, self._baselines, strict=True):
            if _speaks(callback):
                states[name] = {"own": callback.get_state()}
                continue
            changed = fields.select_changed(_read(callback), baseline)
            for field in [field for field, value in changed.items() if _is_large(value)]:
                large[f"{name}.{field}"] = self._pack_large(f"{name}.{field}", changed.pop(field))
            states[name] = {"fields": changed}
        self._large = {key: self._large[key] for key in large}
        return states, large

    def write(self, states: dict[str, Value], large: dict[str, Value]) -> list[str]:
        """Puts back what `read` returned; returns sentences about what has no counterpart."""
        for name, callback, baseline in zip(self._names, self._callbacks, self._baselines, strict=True):
            state = states.get(name)
            if state is None:
                continue
            if "own" in state and _speaks(callback):
                callback.set_state(state["own"])
            elif "fields" in state:
                _write(callback, fields.copy_fields(baseline) | state["fields"] | _select(large, f"{name}."))
        lost = sorted(name for name, state in states.items() if name not in self._names and any(state.values()))
        return [f"the run had a callback {name}, this one has none: what it knew is dropped" for name in lost]

    def _pack_large(self, key: str, value: list[np.ndarray]) -> Attachment:
        """Packs arrays only if they are others than at the last save, as far as samples tell."""
        sample = b"".join([repr(list(map(id, value))).encode(), *map(fields.take_sample, value)])
        if key not in self._large or self._large[key][0] != sample:
            self._large[key] = sample, pack(value)
        return self._large[key][1]


def _number_names(callbacks: Sequence[Callback]) -> list[str]:
    """Returns the names of the classes, numbered where there are several of one."""
    seen: Counter[str] = Counter()
    names = []
    for callback in callbacks:
        name = type(callback).__name__
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names


def _speaks(callback: Callback) -> bool:
    return callable(getattr(callback, "get_state", None)) and callable(getattr(callback, "set_state", None))


def _read(callback: Callback) -> fields.Fields:
    if _speaks(callback):
        return {}
    own = fields.read_fields(callback, without=_OF_KERAS)
    operator = getattr(callback, _OPERATOR, None)
    # Keras chooses it late, and turns the sign of `min_delta` when it does: the two belong together.
    name = getattr(operator, "__name__", "")
    return own | {_OPERATOR: name} if operator is not None and getattr(keras.ops, name, None) is operator else own


def _write(callback: Callback, values: fields.Fields) -> None:
    operator = values.pop(_OPERATOR, None)
    if isinstance(operator, str):
        setattr(callback, _OPERATOR, getattr(keras.ops, operator))
    fields.write_fields(callback, values)


def _select(values: dict[str, Value], prefix: str) -> dict[str, Value]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _is_large(value: Value) -> bool:
    is_arrays = isinstance(value, list) and bool(value) and all(isinstance(item, np.ndarray) for item in value)
    return is_arrays and sum(item.nbytes for item in value) >= _LARGE_BYTES
