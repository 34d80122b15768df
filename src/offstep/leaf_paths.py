"""The paths of a pytree's leaves, as a checkpoint writes them down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from offstep.records import PathKey

Tree = Any  # any pytree


def list_paths(tree: Tree) -> list[tuple[PathKey, ...]]:
    """Returns the path of each leaf, in the order in which JAX flattens the tree."""
    return [path_keys(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def path_keys(path: Sequence[Any]) -> tuple[PathKey, ...]:  # of jax.tree_util's key types
    """Returns the keys of one path of `jax.tree_util`."""
    return tuple(_path_key(key) for key in path)


def _path_key(key: Any) -> PathKey:
    if isinstance(key, jax.tree_util.SequenceKey):
        return int(key.idx)
    if isinstance(key, jax.tree_util.FlattenedIndexKey):
        return int(key.key)
    return str(key.name if isinstance(key, jax.tree_util.GetAttrKey) else key.key)
