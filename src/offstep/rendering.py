"""Files that only the trainer can make, from snapshots, and whether the writer makes the right ones."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from offstep.buffers import CAN_SHARE, Slot
from offstep.records import LeafLayout, Plan

_PAGE_BYTES = 4096


class Rendering:
    """How the trainer makes a file, on a thread beside the one that trains.

    Args:
        render: Returns the whole file for the arrays of one snapshot, in the order of the plan.
        find_difference: Returns in what the writer's file would differ from the right one for these arrays; empty when
            it does not. `None` when each file is rendered anyway.
    """

    def __init__(
        self,
        render: Callable[[Sequence[np.ndarray]], bytes],
        find_difference: Callable[[Sequence[np.ndarray]], str] | None = None,
    ) -> None:
        self.render = render
        self._find_difference = find_difference
        self.is_settled = False  # the writer makes the right files; written by the rendering thread only
        self.difference = ""  # why it does not; the same

    def has_to_render(self, arrays: Sequence[np.ndarray]) -> bool:
        """Returns whether this snapshot has to be rendered. Compares once."""
        if self._find_difference is None:
            return True
        if not self.is_settled and not self.difference:
            self.difference = self._find_difference(arrays)
            self.is_settled = not self.difference
        return bool(self.difference)


def read_arrays(plan: Plan, buffer: mmap.mmap) -> list[np.ndarray]:
    """Returns the leaves of a snapshot whose plan holds them whole: read-only views of the slot."""
    return [_read_array(layout, buffer) for layout in plan.leaves]


def _read_array(layout: LeafLayout, buffer: mmap.mmap) -> np.ndarray:
    leaf = layout.leaf
    dtype = np.dtype(getattr(ml_dtypes, leaf.dtype, leaf.dtype))
    array = np.ndarray(leaf.shape, dtype, memoryview(buffer).toreadonly(), layout.offset)
    return array


def make_image(content: bytes) -> Slot:
    """Returns a slot that holds `content`, to be handed to the writer."""
    image = Slot(max(1, -(-len(content) // _PAGE_BYTES)) * _PAGE_BYTES, shared=CAN_SHARE)
    image.buffer[: len(content)] = content
    return image
