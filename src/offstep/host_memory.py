"""Arrays in host memory that are on their way to a device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_ALIGNMENT = 16
_XLA_ALIGNMENT = 64


def make_array(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an array without values, aligned for any dtype, but not so well that XLA would take its memory over.

    An array of JAX in borrowed memory can never be donated: the first training step would copy the whole state.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 2 * _XLA_ALIGNMENT, np.uint8)
    start = (_ALIGNMENT - address_of(memory)) % _XLA_ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def keep_from_xla(array: np.ndarray) -> np.ndarray:
    """Returns the array, or a copy of it if XLA would take its memory over."""
    if address_of(array) % _XLA_ALIGNMENT:
        return array
    copy = make_array(array.shape, array.dtype)
    copy[...] = array
    return copy


def address_of(array: np.ndarray) -> int:
    """Returns where the array's first element lies."""
    address: int = array.__array_interface__["data"][0]
    return address


def copy_into(targets: Sequence[np.ndarray], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Copies arrays into others of the same shape and dtype, and returns those."""
    for target, array in zip(targets, arrays, strict=True):
        target[...] = array
    return list(targets)
