"""How many values of a snapshot are NaN or infinite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np

from offstep import _native
from offstep.records import Plan

FLOAT_RANGE = np.dtype([("offset", "<u8"), ("size", "<u8"), ("kind", "<u4"), ("reserved", "<u4")])
"""One range that `_native.count_nonfinite` looks at."""

_KINDS = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3, "complex64": 2, "complex128": 3}


def float_table(plan: Plan) -> bytes:
    """Returns the `FLOAT_RANGE` rows of all leaves that can hold NaN or infinity; floats of 8 bits are left out."""
    rows = [
        (offset, layout.chunk_bytes, kind, 0)
        for layout in plan.leaves
        if (kind := _KINDS.get(layout.leaf.dtype)) is not None
        for offset, _ in layout.chunk_ranges()
    ]
    return np.array(rows, dtype=FLOAT_RANGE).tobytes()


def count_nonfinite(memory: memoryview, table: bytes, offsets: Mapping[int, int]) -> int:
    """Returns how many values are NaN or infinite in chunks that lie elsewhere than in a slot.

    Args:
        memory: What they lie in.
        table: Of the slot's plan.
        offsets: Where the chunk at an offset of the slot is.
    """
    rows = np.frombuffer(table, FLOAT_RANGE).copy()
    rows["offset"] = [offsets[int(offset)] for offset in rows["offset"]]
    return int(_native.count_nonfinite(memory, rows.tobytes()))


@contextmanager
def counted_beside(slot: memoryview, table: bytes) -> Iterator[Callable[[], int]]:
    """Counts in a thread while the block runs, as writing leaves the processor idle; the answer waits for the count.

    Args:
        slot: One whole slot; it keeps its contents until the block has ended.
        table: Of its plan.
    """
    count = partial(_native.count_nonfinite, slot, table)
    with ThreadPoolExecutor(1, "offstep-count") as pool:
        try:
            answer = pool.submit(count).result
        except RuntimeError:  # a thread that writes while the interpreter ends can start no others
            answer = count
        yield answer
