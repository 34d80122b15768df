"""Saves any JAX pytree while training goes on: the engine's face for loops that do not use Keras."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from offstep import attachments, catalog, commit, ownership, recovery, retention
from offstep.arrays import describe_leaf
from offstep.attachments import Attachment, Value
from offstep.cards import describe_saves, make_card
from offstep.engine import Engine
from offstep.errors import CheckpointDamaged, CheckpointNotFound, UnsupportedLeaf
from offstep.holders import own_path
from offstep.leaf_paths import list_paths, path_keys
from offstep.options import Layout, Mode, OnBusy, OnError, Options
from offstep.pending import PendingSave
from offstep.records import PathKey, SaveStats, Target
from offstep.reports import Counts
from offstep.stored_tree import read_tree
from offstep.stores import staging
from offstep.stores.address import Address, Place, to_place
from offstep.stores.path import Readable, open_place
from offstep.words import show_count

Tree = Any  # any pytree of arrays and numbers
T = TypeVar("T")


class Checkpointer:
    """Saves pytrees as the steps of one directory, without waiting for the disk.

    Each step is a directory in Orbax's layout, durable once it is visible under its number. Use it from the thread
    that runs the training steps.

    A script that ends without `close`, by an exception too, waits at its exit until everything saved is durable. A
    failure that no call has raised by then is printed to stderr and makes the exit status 1 where it would be 0. In
    a forked child a checkpointer starts anew, with a writer of the child's own.

    Args:
        directory: Where the steps go; made if missing. Or an address in a store: `"s3://bucket/run"`.
        max_to_keep: How many of the newest steps stay, and beside them the best by `monitor`; `None` keeps all. One
            with NaN or infinite values never retires one without.
        keep_best: How many of the best stay; 1 where there is a `monitor`.
        keep_every: Steps that are multiples of it stay as well.
        monitor: Name of the metric, among those given to `save`, that says which step is best.
        mode: Whether `"min"` or `"max"` of it is best.
        slots: How many snapshots may be on their way at once; each takes host memory of the size of the state.
        on_busy: When all slots are on their way: `"wait"` for one, `"skip"` the save, or let the `"latest"` replace
            the oldest that the writer has not begun (needs two slots). What is dropped is counted, and said once.
        on_error: Whether a save that failed in the background is raised by the next call, or only warned of.
        memory_budget: Most bytes of host memory for slots; `None` takes 80 % of what is available.
        copy_threads: Threads that copy a snapshot on the CPU backend.
        snapshot_mode: `"host"`, `"device_copy"` or `"transfer"`; `None` chooses by the devices and their free memory.
        in_process: Write in a thread rather than in a process of its own.
        skip_unchanged: Do not write again what stays as it is: each checkpoint links a file with the leaves that have
            not changed since the first save. `True` looks at all leaves; a function is given a leaf's path, joined by
            dots, and says whether to look at it. Two checkpoints then share a part of their bytes on the disk.
        full_every: With `skip_unchanged`, each how many saves everything is written anew; `None` only when it must be.
        retry_seconds: How long a save that fails for want of space, or is interrupted, is tried again before that is
            an error; later saves wait for it.
        exit_seconds: How long the end of the process waits for saves; what is not durable by then is said.
        private: Only the owner of the process may read the checkpoints (modes 0600 and 0700); else the umask decides.
        commit_seconds: Where several processes train (`jax.distributed`): how long after its snapshot a save may take
            until all have written their shares. After that it fails, and names who is missing.
        layout: Where several processes train: `"shared"` where all see the directory; `"local"` where each host has a
            disk of its own: then process i saves what it holds to `process_<i>` in the directory.
        takeover: Save here though another live run does, whose later saves fail. Without it the first `save` refuses.

    Raises:
        ValueError: an argument is out of range.
        OSError: the directory cannot be made or written to; the store does not answer, or does not let us save there.

    Example:
        >>> import jax.numpy as jnp, offstep, tempfile
        >>> with offstep.Checkpointer(tempfile.mkdtemp()) as checkpointer:
        ...     pending = checkpointer.save(7, {"w": jnp.ones((2, 3))})
        ...     checkpointer.wait()
        ...     checkpointer.latest_step()
        7
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_to_keep: int | None = None,
        keep_best: int | None = None,
        keep_every: int | None = None,
        monitor: str | None = None,
        mode: retention.Mode = "min",
        slots: int = 2,
        on_busy: OnBusy = "wait",
        on_error: OnError = "raise",
        memory_budget: int | None = None,
        copy_threads: int = 2,
        snapshot_mode: Mode | None = None,
        in_process: bool = False,
        skip_unchanged: bool | Callable[[str], bool] = False,
        full_every: int | None = None,
        retry_seconds: float = 30.0,
        exit_seconds: float = 300.0,
        private: bool = False,
        takeover: bool = False,
        commit_seconds: float = 300.0,
        layout: Layout = "shared",
    ) -> None:
        self._takeover = takeover
        place = to_place(os.fspath(directory))
        if isinstance(place, Address):
            if skip_unchanged:
                raise ValueError(f"skip_unchanged wants a directory, which shares files. Received: {directory=!s}")
            check_remote(private=private, takeover=takeover)
        retention.check_counts(max_to_keep=max_to_keep, keep_best=keep_best, keep_every=keep_every)
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max'. Received: {mode!r}")
        if keep_best is not None and monitor is None:
            raise ValueError(f"keep_best needs the name of a metric in monitor. Received: {keep_best=}")
        self._ranking = retention.Ranking(monitor, mode, keep_best or 1, keep_every)
        check_full_every(full_every, is_skipping=bool(skip_unchanged))
        self._is_frozen = skip_unchanged if callable(skip_unchanged) else lambda _: skip_unchanged
        options = Options(
            slots=slots,
            on_busy=on_busy,
            on_error=on_error,
            memory_budget=memory_budget,
            copy_threads=copy_threads,
            snapshot_mode=snapshot_mode,
            in_process=in_process,
            full_every=full_every,
            retry_seconds=retry_seconds,
            exit_seconds=exit_seconds,
            private=private,
            commit_seconds=commit_seconds,
            layout=layout,
        )
        self._engine = Engine(options)
        if layout == "local":
            place = Path(own_path(os.fspath(directory)))
        self.directory: Place = place.absolute() if isinstance(place, Path) else place
        self._max_to_keep = max_to_keep
        self._treedef: Any = None  # jax.tree_util.PyTreeDef
        if isinstance(self.directory, Path):
            commit.probe_directory(self.directory)
        else:
            staging.probe(self.directory, retry_seconds)

    def save(
        self,
        step: int,
        tree: Tree,
        metrics: dict[str, float] | None = None,
        *,
        extra: Mapping[str, Value] | None = None,
    ) -> PendingSave | None:
        """Takes a snapshot of `tree` and returns; the checkpoint becomes durable in the background.

        The arrays may be donated or changed as soon as this returns. A step that exists already is replaced.

        Args:
            step: Training step, not negative.
            tree: Arrays of numbers in dicts, lists, tuples or dataclasses.
            metrics: Numbers to keep with the checkpoint in `offstep.json`; one on a device is waited for.
            extra: What else belongs to the step, such as the state of a data iterator: numbers, texts, bytes, arrays,
                in dicts, lists and tuples. `restore_extra` gives it back as it was, arrays of JAX as NumPy's; stock
                readers do not see it. It is copied at once, on this thread.

        Returns:
            The pending save; `None` when it was skipped (`on_busy="skip"`, seldom `"latest"`).

        Raises:
            ValueError: the step is no integer or negative, a metric is no number, or `extra` is no dict.
            TypeError: something in `extra` cannot be kept.
            SaveFailed: an earlier save failed.
            UnsupportedLeaf: a leaf is not an array of numbers.
            BudgetExceeded: a snapshot does not fit into the memory budget.
            TargetInUse: another live run saves to the directory.
        """
        step, numbers = _check_step(step), _check_metrics(metrics or {})
        attached = _pack_extra(extra)
        self._engine.poll()
        arrays, treedef = jax.tree_util.tree_flatten(tree)
        if self._treedef is None or treedef != self._treedef or not self._engine.matches(arrays):
            self._open(tree, arrays)
            self._treedef = treedef
        target = Target(self.directory, self.directory, str(self.directory / str(step)), self._max_to_keep)
        about = {"metrics": numbers, "versions": {"jax": jax.__version__}}
        if not self._engine.writes_common:
            attached = {}
        return self._engine.save(
            arrays, step, lambda _: target, manifest=about, ranking=self._ranking, attachments=attached
        )

    def wait(self, timeout: float | None = None) -> None:
        """Waits until everything saved so far is durable.

        Raises:
            SaveFailed: a save failed.
            SaveTimeout: `timeout` seconds ran out; it names the steps that are not durable, and the newest that is.
                The saves go on.
        """
        self._engine.wait(timeout)

    def latest_step(self) -> int | None:
        """Returns the newest durable step, or `None`."""
        return catalog.latest_step(open_place(self.directory))

    def all_steps(self) -> list[int]:
        """Returns all durable steps, in ascending order."""
        return catalog.list_steps(open_place(self.directory))

    def restore(self, step: int | None = None, like: Tree | None = None) -> Tree:
        """Reads a checkpoint back, checking every checksum.

        What `offstep.restore` does not know goes to Orbax: leaves of `like` that are no arrays, and, without `like`,
        keys of random generators and arrays that were on several devices.

        Args:
            step: Which one; `None` takes the newest that is whole, and warns of a newer one that is not.
            like: A tree of arrays, or of `jax.ShapeDtypeStruct`, with the structure, dtypes and shardings wanted.
                Without it the tree comes back as nested dicts and lists with the shardings that were saved.

        Raises:
            CheckpointNotFound: there is no such step.
            CheckpointDamaged: a checksum or a file is wrong.
            StructureMismatch: checkpoint and `like` do not agree.
        """
        return self._read(step, lambda checkpoint: read_tree(checkpoint, like))

    def restore_extra(self, step: int | None = None) -> dict[str, Value]:
        """Reads what was given as `extra` when a checkpoint was saved; empty if nothing was.

        Args:
            step: Which one; `None` takes the newest that is whole, and warns of a newer one that is not.

        Raises:
            CheckpointNotFound: there is no such step.
            CheckpointDamaged: it is not what was saved.
        """
        return self._read(step, attachments.read_extra)

    def _read(self, step: int | None, read: Callable[[Readable], T]) -> T:
        if step is None:
            return self._read_newest(read)
        if step not in (steps := self.all_steps()):
            raise CheckpointNotFound(f"{self.directory} holds no step {step}; it has {steps or 'none'}")
        return read(open_place(self.directory / str(step)))

    def _read_newest(self, read: Callable[[Readable], T]) -> T:
        damage: CheckpointDamaged | None = None
        for checkpoint in catalog.find_whole(open_place(self.directory)):
            if damage is not None:
                warnings.warn(f"a newer step is passed over: {damage}", RuntimeWarning, stacklevel=4)
            try:
                return read(checkpoint)
            except CheckpointDamaged as error:
                damage = error
        raise damage or CheckpointNotFound(f"{self.directory} holds no step that is whole")

    @property
    def stats(self) -> list[SaveStats]:
        """What each save cost, oldest first."""
        return self._engine.stats

    @property
    def counts(self) -> Counts:
        """How many saves were requested, became durable, failed, were skipped."""
        return self._engine.counts

    def _repr_html_(self) -> str:
        rows = describe_saves(self.stats, self.counts)
        if isinstance(self.directory, Path):  # else it would ask over the network
            steps = self.all_steps()
            newest = f", the newest {steps[-1]:,}" if steps else ""
            rows.insert(0, ("there are", show_count(len(steps), "step") + newest))
        return make_card("Checkpointer", str(self.directory), rows)

    def close(self) -> None:
        """Waits for all saves and frees the slots.

        Raises:
            SaveFailed: a save failed.
        """
        self._engine.close()
        self._engine.raise_failures()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hold(self) -> ownership.Lock:
        keep = self._max_to_keep
        policy = ownership.Policy(max_to_keep=keep, ranking=None if keep is None else self._ranking)
        assert isinstance(self.directory, Path), "only what is not in a store is locked"
        return recovery.hold(ownership.lock_path(self.directory), takeover=self._takeover, policy=policy)

    def _open(self, tree: Tree, arrays: Sequence[Any]) -> None:
        empty_nodes = _empty_nodes(tree)
        if not arrays:
            raise UnsupportedLeaf(f"the tree holds no array. Received: {tree!r}")
        paths = list_paths(tree)
        if () in paths:
            raise UnsupportedLeaf(f"a bare array has no name; put it into a dict. Received: {type(tree).__name__}")
        leaves = [describe_leaf(path, array) for path, array in zip(paths, arrays, strict=True)]
        leaves = [replace(leaf, is_frozen=bool(self._is_frozen(leaf.name))) for leaf in leaves]
        self._engine.open(
            leaves,
            arrays,
            empty_nodes=empty_nodes,
            owner=self,
            hold=self._hold if isinstance(self.directory, Path) else None,
        )
        self._engine.make_ready()


def check_full_every(full_every: int | None, *, is_skipping: bool) -> None:
    """Raises a `ValueError` when everything is written every time anyway."""
    if full_every is not None and not is_skipping:
        raise ValueError(f"full_every is for skip_unchanged only. Received: {full_every!r}")


def check_remote(*, private: bool, takeover: bool) -> None:
    """Raises a `ValueError` for what a store does not know."""
    if private:
        raise ValueError("who may read what is in a store, its bucket says. Received: private=True")
    if takeover:
        raise ValueError("in a store there are no locks to take over. Received: takeover=True")


def _pack_extra(extra: Mapping[str, Value] | None) -> dict[str, Attachment]:
    if extra is None:
        return {}
    if not isinstance(extra, Mapping):
        raise ValueError(f"extra must be a dict. Received: {type(extra).__name__}")
    on_host = jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf, dict(extra))
    return {attachments.EXTRA_NAME: attachments.pack(on_host)}


def _check_step(step: int) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"step must be an integer that is not negative. Received: {step!r}")
    return number


def _check_metrics(metrics: dict[str, float]) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"metrics must be a dict of numbers. Received: {metrics!r}") from None


def _empty_nodes(tree: Tree) -> list[tuple[tuple[PathKey, ...], str]]:
    """Returns the empty containers of a tree with Orbax's names for them; Orbax wants an entry for each."""

    def is_empty(node: Tree) -> bool:
        return node is None or (isinstance(node, (dict, list, tuple)) and not node)

    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_empty)
    return [(path_keys(path), _empty_kind(node, path)) for path, node in found if is_empty(node)]


def _empty_kind(node: Tree, path: Sequence[Any]) -> str:
    if not path:
        raise UnsupportedLeaf(f"the tree is empty. Received: {node!r}")
    if node is None or hasattr(node, "_fields"):  # Orbax does not tell an empty named tuple from nothing
        return "None"
    if isinstance(node, dict):
        return "Dict"
    return "List" if isinstance(node, list) else "Tuple"
