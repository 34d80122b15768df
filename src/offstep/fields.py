"""The plain fields of an object: those that can be kept with a checkpoint and put back later."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from offstep.attachments import Value, is_packable, is_same

MOST_BYTES = 16 << 20
"""Larger arrays are taken for data, which does not change."""

_MANY = 10_000  # items; longer lists are looked at by samples, and only those of numbers are fields
_SAMPLES = 64

Fields = dict[str, Value]


def read_fields(owner: object, without: Collection[str] = ()) -> Fields:
    """Returns the fields that are numbers, texts, arrays, random generators, or lists, tuples and dicts of them.

    The values are the live ones: they change with the object. Only what is private to Python's `__slots__` is missed.
    """
    fields = {}
    for name, value in vars(owner).items():
        if name in without or _is_data(value):
            continue
        plain = _read_random(value)
        if plain is not None or is_packable(value):
            fields[name] = value if plain is None else plain
    return fields


def copy_fields(fields: Fields) -> Fields:
    """Returns values that the object does not change."""
    return copy.deepcopy(fields)


def select_changed(fields: Fields, baseline: Fields) -> Fields:
    """Returns the fields that differ from those of the baseline, or are new."""
    return {
        name: value for name, value in fields.items() if name not in baseline or not _seems_same(value, baseline[name])
    }


def _seems_same(first: Value, second: Value) -> bool:
    if _is_long(first) and _is_long(second):
        return take_sample(first) == take_sample(second)
    return is_same(first, second)


def write_fields(owner: object, fields: Mapping[str, Value]) -> None:
    """Puts fields back; lists, dicts and random generators in place, because others may hold them too."""
    for name, value in fields.items():
        current = getattr(owner, name, None)
        if _read_random(current) is not None:
            _write_random(current, value)
        elif isinstance(current, list) and isinstance(value, list):
            current[:] = value
        elif isinstance(current, dict) and isinstance(value, dict):
            current.clear()
            current.update(value)
        else:
            setattr(owner, name, value)


def find_opaque(owner: object) -> list[str]:
    """Returns the names of the fields that may hold state which cannot be seen from outside."""
    harmless = (type, type(len), type(find_opaque), np.ndarray, os.PathLike)
    return [
        name
        for name, value in vars(owner).items()
        if not isinstance(value, harmless)
        and not _is_data(value)
        and _read_random(value) is None
        and not is_packable(value)
    ]


def sample_data(owner: object) -> dict[str, bytes]:
    """Returns a little of everything that is too large to be a field: it changes when that is shuffled in place."""
    return {name: take_sample(value) for name, value in vars(owner).items() if _is_data(value)}


def take_sample(value: Value) -> bytes:
    """Returns the length and some items of an array, a list or a dict, spread evenly."""
    if isinstance(value, np.ndarray):
        flat = value.reshape(-1) if value.flags.c_contiguous else value.flat
        return np.asarray(flat[:: max(1, value.size // _SAMPLES)]).tobytes()
    items = list(value) if isinstance(value, dict) else value
    return repr((len(items), items[:: max(1, len(items) // _SAMPLES)])).encode()


def _is_long(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.size > _MANY
    return isinstance(value, (list, tuple, dict)) and len(value) > _MANY


def _is_data(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.nbytes > MOST_BYTES
    if not _is_long(value):
        return False
    return not (isinstance(value, list) and set(map(type, value)) in ({int}, {float}))


def _read_random(value: object) -> Value:
    """Returns the state of a random generator; `None` for what is none."""
    if isinstance(value, np.random.Generator):
        return dict(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False)
    if isinstance(value, random.Random):
        return value.getstate()
    return None


def _write_random(generator: Any, state: Value) -> None:  # any of the three kinds above
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)
