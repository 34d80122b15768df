"""Puts a checkpoint back into a live model or tree: whole or in part, under other names, on other devices."""

from __future__ import annotations

import difflib
import gc
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from offstep import leaf_paths
from offstep.attachments import Value, read_extra
from offstep.coordination import find_group
from offstep.discovery import READ_THREADS, open_newest, open_newest_of, place_tiers
from offstep.errors import StructureMismatch
from offstep.joint_discovery import may_be_on_own_disks, next_key, open_together
from offstep.matching import Matching, Renaming, Selection, TargetLeaf, rename_leaves
from offstep.placement import (
    IN_PLACE_BYTES,
    Array,
    Destination,
    choose_overwritten,
    describe_destination,
    place,
    split_batches,
)
from offstep.stored import Reader, Region, StoredLeaf
from offstep.stores.path import Readable, StorePath, open_place
from offstep.wishes import Wishes, check_arguments, check_matching, match_wanted, show_names

if TYPE_CHECKING:
    from offstep.keras_restore import ModelTarget

Tree = Any  # any pytree, or a Keras model
_SIMILAR = 5


@dataclass(frozen=True)
class RestoreReport:
    """What a restore did. Names are paths joined by slashes, such as `"trainable_variables/dense/kernel"`.

    Attributes:
        path: The checkpoint that was read.
        step: Its training step, where it says so.
        restored: Leaves of the target that got their values.
        missing: Wanted leaves of the target that the checkpoint does not have; they keep their values.
        left_over: Leaves of the checkpoint that nobody took.
        by_position: Leaf of the target to that of the checkpoint, where the names differ and the position decided.
        mismatched: Leaf of the target to why its stored one does not fit (only with `strict=False`).
        manifest: What offstep keeps with a checkpoint: step, epoch, batch, metrics, ...; empty for those of others.
        extra: What `Checkpointer.save(extra=...)` kept with it.
        note: What is to be said beyond that; mostly empty.
        tree: The restored tree, where the target was one.
    """

    path: Readable
    step: int | None
    restored: tuple[str, ...]
    missing: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    by_position: Mapping[str, str] = field(default_factory=dict)
    mismatched: Mapping[str, str] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Value] = field(default_factory=dict)
    note: str = ""
    tree: Tree = field(default=None, repr=False)


def restore(
    target: Tree,
    path: str | os.PathLike[str] | StorePath,
    *,
    partial: Selection | None = None,
    rename: Renaming | None = None,
    strict: bool = True,
    cast: bool = False,
    threads: int = READ_THREADS,
    local: str | os.PathLike[str] | None = None,
) -> RestoreReport:
    """Reads a checkpoint straight into the devices' memory, checking every checksum that there is.

    A Keras model gets its weights, optimizer, metrics and seed generators in place; it must be built. Of a tree of
    arrays (or of `jax.ShapeDtypeStruct`, Python numbers, NumPy arrays, PRNG keys) a new one is made, `report.tree`,
    with its dtypes and shardings. Leaves are matched by path. Where Keras has numbered names differently in this
    process, those of a fresh process count, then the position in the structure: `report.by_position` lists these.

    Blocks until all is on the devices. At most one leaf (or 32 MiB of them) is in host memory at a time.

    Args:
        target: The built model, or the tree.
        path: A checkpoint of offstep, Orbax or Keras; or a directory of them, whose newest valid one is taken. Also
            in a store: `"s3://bucket/run"`, `"gs://bucket/run"`.
        partial: Only these leaves of the target: prefixes of their names, with or without the group in front
            (`"dense_1"`, `"dense_1/bias"`, `"optimizer_variables"`), or a predicate on the whole name.
        rename: Old to new prefixes of names in the checkpoint (`{"dense": "encoder"}`), or a function from one
            name to another; `None` from it leaves that leaf out.
        strict: Whether a leaf that is missing, left over or does not fit is an error. Metrics and the states of random
            generators never are, nor groups that the checkpoint or the model does not have at all.
        cast: Convert dtypes that differ.
        threads: Threads that read.
        local: Directory of steps of which some were copied to `path`: the newest valid step of both is taken. Where
            it is on disks of several processes' own, the newest that all have; they all restore at the same time.

    Raises:
        StructureMismatch: checkpoint and target do not agree. Nothing has been changed.
        CheckpointDamaged: a checksum or a file is wrong. Nothing has been changed, unless the error's notes say so:
            what stock Orbax wrote, or comes from a store, is checked while it is read.
        CheckpointNotFound: there is nothing at `path`.
        UnsupportedFormat: it is no checkpoint, or one of a newer offstep.

    Example:
        >>> import jax.numpy as jnp, offstep, tempfile
        >>> directory = tempfile.mkdtemp()
        >>> with offstep.Checkpointer(directory) as checkpointer:
        ...     pending = checkpointer.save(7, {"w": jnp.ones((2, 3))})
        >>> offstep.restore({"w": jnp.zeros((2, 3))}, directory).tree["w"].sum()
        Array(6., dtype=float32)
    """
    check_arguments(partial, rename, threads)
    with _collector_paused(), closing(_open(target, place_tiers(path, local))) as reader:
        return _restore(target, reader, Wishes(partial, rename, strict, cast, threads))


def restore_from(target: Tree, reader: Reader) -> RestoreReport:
    """Does what `restore` does without further arguments, from a checkpoint that is open."""
    return _restore(target, reader, Wishes(None, None, strict=True, cast=False, threads=READ_THREADS))


def _restore(target: Tree, reader: Reader, wishes: Wishes) -> RestoreReport:
    with _collector_paused():
        return (_restore_model if _is_model(target) else _restore_tree)(target, reader, wishes)


def read(path: str | os.PathLike[str] | StorePath, leaf: str, *, threads: int = READ_THREADS) -> np.ndarray:
    """Returns one array of a checkpoint, without reading the others.

    Args:
        path: A checkpoint, or a directory whose newest one is taken.
        leaf: Name of the leaf, its keys joined by slashes (or by dots); the group may be left out where that leaves
            no doubt. In a Keras file it is the path of the dataset, e.g. `"layers/dense/vars/0"`.
        threads: Threads that read.

    Raises:
        KeyError: there is no such leaf, or several; the message lists similar ones.
        CheckpointNotFound, UnsupportedFormat, CheckpointDamaged: see `restore`.
    """
    with closing(open_newest(open_place(path), verify=False)) as reader:
        found = _find_leaf(reader.contents.leaves, leaf, reader.path)
        return reader.read([Region(found)], threads)[0]


def _open(target: Tree, places: Sequence[Readable]) -> Reader:
    """Opens a checkpoint; of those on disks of each process's own, one that the others take too."""
    group = find_group()
    if group is None or not may_be_on_own_disks(places, is_spread=_is_spread(target)):
        return open_newest_of(places, verify="fast")
    return open_together(group, next_key(), places, verify="fast")


def _is_spread(target: Tree) -> bool:
    """Returns whether a part of the target is out of this process's reach: then all processes restore it."""
    leaves = [each.value for each in target.variables] if _is_model(target) else jax.tree_util.tree_leaves(target)
    shardings = [getattr(leaf, "sharding", None) for leaf in leaves]
    return any(isinstance(each, jax.sharding.Sharding) and not each.is_fully_addressable for each in shardings)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Thousands of leaves set off a collection that walks all of Keras: 100 ms, and none of it is garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _is_model(target: object) -> bool:
    keras = sys.modules.get("keras")  # whoever has a model has imported it
    return keras is not None and isinstance(target, keras.Model)


# --- models ----------------------------------------------------------------------------------------------------------


def _restore_model(model: Any, reader: Reader, wishes: Wishes) -> RestoreReport:  # of Keras
    from offstep import keras_restore

    target = keras_restore.open_model(model, reader.contents)
    stored, reason = keras_restore.name_leaves(target, reader.contents)
    if reason:
        return _leave_to_keras(target, reader, wishes, reason)
    matching = match_wanted(
        rename_leaves(stored, wishes.rename), target.leaves, wishes, reader.contents, target.find_names
    )
    check_matching(matching, target.leaves, reader, wishes)
    done = 0
    try:
        for count in _fill(target, reader, matching.pairs, wishes.threads):
            done += count
    except Exception as error:
        if done:
            error.add_note(f"{done} of {len(matching.pairs)} leaves had been restored: the model is a mixture now.")
        raise
    target.finish()
    return _report(reader, matching, target.leaves)


def _leave_to_keras(target: ModelTarget, reader: Reader, wishes: Wishes, reason: str) -> RestoreReport:
    """Restores a file whose datasets only the layers themselves understand."""
    from offstep import keras_restore

    if wishes.partial is not None or wishes.rename is not None or wishes.cast:
        raise StructureMismatch(
            f"{reader.path} can only be restored whole and as it is into this model: {reason}. Leave out partial, "
            "rename and cast, or restore from a directory that Orbax or offstep wrote."
        )
    restored, missing = keras_restore.load_by_keras(target, reader)
    note = f"keras.Model.load_weights has loaded the file, without a report of what it took: {reason}"
    return replace(_report(reader, Matching((), missing=missing), ()), restored=restored, note=note)


def _fill(target: ModelTarget, reader: Reader, pairs: Sequence[tuple[int, StoredLeaf]], threads: int) -> Iterator[int]:
    """Puts the leaves into the model, step by step; yields how many each step restored."""
    large = choose_overwritten([(leaf, target.leaves[number].dtype) for number, leaf in pairs])
    is_large = frozenset(large)
    others = [pair for at, pair in enumerate(pairs) if at not in is_large]
    for batch in split_batches([pairs[at][1] for at in large], IN_PLACE_BYTES):
        chosen = [pairs[large[at]] for at in batch]
        memories = [target.open_memory(number) for number, _ in chosen]
        others += [pair for pair, memory in zip(chosen, memories, strict=True) if memory is None]
        regions = [Region(leaf) for (_, leaf), memory in zip(chosen, memories, strict=True) if memory is not None]
        reader.read(regions, threads, [memory for memory in memories if memory is not None])
        yield len(regions)
    for placed in place(reader, [(leaf, target.describe(number)) for number, leaf in others], threads):
        for at, array in placed:
            target.assign(others[at][0], array)
        yield len(placed)


# --- trees -----------------------------------------------------------------------------------------------------------


def _restore_tree(tree: Tree, reader: Reader, wishes: Wishes) -> RestoreReport:
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    destinations = [_describe_leaf(leaf) for leaf in leaves]
    paths = leaf_paths.list_paths(tree)
    targets = [TargetLeaf(path, place.shape, place.dtype) for path, place in zip(paths, destinations, strict=True)]
    stored = rename_leaves([(leaf.path, leaf) for leaf in reader.contents.leaves], wishes.rename)
    matching = match_wanted(stored, targets, wishes, reader.contents, None)
    check_matching(matching, targets, reader, wishes)
    pairs = [(leaf, destinations[number]) for number, leaf in matching.pairs]
    for placed in place(reader, pairs, wishes.threads):
        for at, array in placed:
            leaves[matching.pairs[at][0]] = array
    return replace(_report(reader, matching, targets), tree=jax.tree_util.tree_unflatten(treedef, leaves))


def _describe_leaf(leaf: Array) -> Destination:
    try:
        return describe_destination(leaf)
    except (TypeError, ValueError) as error:
        raise StructureMismatch(
            f"target must be a Keras model, or a tree of arrays. Received: {type(leaf).__name__}"
        ) from error


# --- what both need --------------------------------------------------------------------------------------------------


def _report(reader: Reader, matching: Matching, targets: Sequence[TargetLeaf]) -> RestoreReport:
    return RestoreReport(
        path=reader.path,
        step=_find_step(reader),
        restored=tuple(targets[number].name for number, _ in matching.pairs),
        missing=matching.missing,
        left_over=matching.left_over,
        by_position=matching.by_position,
        mismatched=matching.mismatched,
        manifest=reader.contents.manifest,
        extra=read_extra(reader.path),
    )


def _find_step(reader: Reader) -> int | None:
    if "step" in reader.contents.manifest:
        return int(reader.contents.manifest["step"])
    return int(reader.path.name) if reader.path.name.isdecimal() else None


def _find_leaf(leaves: Sequence[StoredLeaf], name: str, path: Readable) -> StoredLeaf:
    wanted = name.strip("/")
    for spell in (_whole_name, _dotted_name, _name_in_group):
        found = [leaf for leaf in leaves if spell(leaf) == wanted]
        if len(found) == 1:
            return found[0]
    names = [leaf.name for leaf in leaves]
    close = difflib.get_close_matches(wanted, names, _SIMILAR, 0.4) or names
    raise KeyError(f"{path} has no leaf {name!r}; similar ones: {show_names(close)}")


def _whole_name(leaf: StoredLeaf) -> str:
    return leaf.name


def _dotted_name(leaf: StoredLeaf) -> str:
    return leaf.name.replace("/", ".")


def _name_in_group(leaf: StoredLeaf) -> str:
    return "/".join(map(str, leaf.path[1:]))
