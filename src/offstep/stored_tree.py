"""The tree that a checkpoint directory holds, read back as it was or as another tree is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from offstep import manifest
from offstep._native import crc32c
from offstep.discovery import open_checkpoint
from offstep.errors import CheckpointDamaged, StructureMismatch
from offstep.formats.orbax_reader import find_item
from offstep.placement import can_describe
from offstep.records import PathKey
from offstep.restoration import restore
from offstep.sharding import parse_sharding, read_sharding_texts
from offstep.stored import StoredLeaf, as_dtype
from offstep.stores.path import Readable, local_copy

Tree = Any  # nested dicts and lists of arrays, numbers and `jax.ShapeDtypeStruct`

_EMPTY: dict[str, Any] = {"Dict": {}, "List": [], "Tuple": (), "None": None}
_SHARDINGS = "pytree/_sharding"
_NUMBERS = {"b": False, "i": 0, "u": 0, "f": 0.0, "c": 0j}  # by the kind of a NumPy dtype


class _Unknown(Exception):
    """Only Orbax knows how to make it."""


def read_tree(checkpoint: Readable, like: Tree | None = None) -> Tree:
    """Returns the tree of one step; see `Checkpointer.restore`.

    Raises:
        StructureMismatch, CheckpointDamaged, UnsupportedFormat: see `offstep.restore`.
    """
    wanted = describe_tree(checkpoint) if like is None else like
    if wanted is None or not all(map(can_describe, jax.tree_util.tree_leaves(wanted))):
        from orbax.checkpoint import v1 as ocp  # takes a second

        with local_copy(checkpoint) as directory:
            return ocp.load(directory, like, checkpointable_name="pytree")
    report = restore(wanted, checkpoint, cast=True)
    if report.missing:  # what `restore` forgives in a model
        raise StructureMismatch(f"{checkpoint} does not have {', '.join(report.missing)}, which the tree asks for")
    return report.tree


def describe_tree(checkpoint: Readable) -> Tree | None:
    """Returns nested dicts and lists whose leaves say what each one was: its shape, its dtype, its device.

    `None` where only Orbax knows that: keys of random generators, arrays on several devices or on one that is not here.

    Raises:
        UnsupportedFormat, CheckpointDamaged: it cannot be opened.
    """
    with closing(open_checkpoint(checkpoint)) as reader:
        contents = reader.contents
    item = find_item(checkpoint)
    texts = {} if item is None else read_sharding_texts(item)
    try:
        nodes = [(leaf.path, _describe_leaf(leaf, texts)) for leaf in contents.leaves]
        return _nest([*nodes, *((path, _make_empty(kind)) for path, kind in contents.others)])
    except _Unknown:
        _check_shardings(checkpoint)
        return None


def _check_shardings(checkpoint: Readable) -> None:
    """Refuses a file of shardings that is not what was written: of a damaged one Orbax only says what it misses."""
    written = manifest.read(checkpoint)
    record = None if written is None else written.files.get(_SHARDINGS)
    if record is not None and record.crc32c not in (None, crc32c((checkpoint / _SHARDINGS).read_bytes())):
        raise CheckpointDamaged(f"{checkpoint / _SHARDINGS} is not what was written: its CRC-32C is another one")


def _describe_leaf(leaf: StoredLeaf, texts: dict[str, str]) -> Any:  # a leaf of a target
    dtype = as_dtype(leaf.dtype)
    if leaf.prng_impl is not None:
        raise _Unknown
    if leaf.value_type == "np.ndarray":
        return np.broadcast_to(np.zeros((), dtype), leaf.shape)  # takes no memory
    if leaf.value_type == "scalar":
        if leaf.shape or dtype.kind not in _NUMBERS:
            raise _Unknown
        return _NUMBERS[dtype.kind]
    sharding = _find_sharding(texts.get(".".join(map(str, leaf.path)), ""))
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)  # type: ignore[no-untyped-call]


@lru_cache(maxsize=256)  # a model has thousands of leaves and a handful of shardings
def _find_sharding(text: str) -> jax.sharding.Sharding:
    sharding = parse_sharding(text)
    if sharding is None:
        raise _Unknown
    return sharding


def _make_empty(kind: str) -> Any:  # an empty container
    if kind not in _EMPTY:
        raise _Unknown
    return _EMPTY[kind]


def _nest(nodes: Sequence[tuple[tuple[PathKey, ...], Any]]) -> Tree:
    if len(nodes) == 1 and not nodes[0][0]:
        return nodes[0][1]
    children: dict[PathKey, list[tuple[tuple[PathKey, ...], Any]]] = {}
    for path, value in nodes:
        if not path:
            raise _Unknown
        children.setdefault(path[0], []).append((path[1:], value))
    if all(isinstance(key, int) for key in children):
        return [_nest(children[key]) for key in sorted(children)]
    return {key: _nest(inner) for key, inner in children.items()}
