"""The mean of several checkpoints' weights, as one checkpoint more."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from offstep.comparison import spell
from offstep.discovery import open_checkpoint
from offstep.errors import StructureMismatch
from offstep.rewriting import rewrite
from offstep.stored import Reader, Region, StoredLeaf
from offstep.stores.path import Readable

_NO_WEIGHTS = ("optimizer", "metrics", "compile_metrics")


def is_weight(leaf: StoredLeaf) -> bool:
    """Returns whether a leaf belongs to the model itself rather than to its optimizer, metrics or random generators."""
    is_seed = leaf.prng_impl is not None or "seed_generator" in leaf.name
    return not is_seed and not str(leaf.path[0]).lstrip("_").startswith(_NO_WEIGHTS)


def average(paths: Sequence[Readable], target: Path) -> list[str]:
    """Writes the mean of the floating weights, summed in float64; returns the names of the leaves that were averaged.

    All else (optimizer, metrics, random generators, integers, the model's configuration) is that of the last path.

    Raises:
        StructureMismatch: the checkpoints do not have the same weights.
        CheckpointDamaged: a checksum is wrong.
        OSError: the result is not durable.
    """
    with ExitStack() as stack:
        readers = [open_checkpoint(path) for path in paths]
        for reader in readers:
            stack.callback(reader.close)
        last = readers[-1]
        wanted = [leaf for leaf in last.contents.leaves if is_weight(leaf) and _is_floating(leaf)]
        others = [_match(reader, wanted, last) for reader in readers[:-1]]
        names = {leaf.name for leaf in wanted}

        def give(region: Region) -> np.ndarray:
            found = last.read([region], 1)[0]
            if region.leaf.name not in names:
                return found
            total = found.astype(np.complex128 if found.dtype.kind == "c" else np.float64)
            for reader, leaves in zip(readers, others, strict=False):
                total += reader.read([Region(leaves[region.leaf.name], region.box)], 1)[0].astype(total.dtype)
            return np.asarray(total / len(readers)).astype(found.dtype)

        rewrite(last, target, give, {"averaged": [str(path) for path in paths]})
    return sorted(names)


def _is_floating(leaf: StoredLeaf) -> bool:
    return "float" in leaf.dtype or "complex" in leaf.dtype


def _match(reader: Reader, wanted: Sequence[StoredLeaf], last: Reader) -> dict[str, StoredLeaf]:
    leaves = {leaf.name: leaf for leaf in reader.contents.leaves}
    for leaf in wanted:
        found = leaves.get(leaf.name)
        if found is None or (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            have = "does not have it" if found is None else f"holds {spell(found)}"
            raise StructureMismatch(
                f"{leaf.name}: {reader.path} {have}, {last.path} holds {spell(leaf)}; only checkpoints of one model "
                "can be averaged"
            )
    return leaves
