"""The Keras callback that brings an interrupted training back."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import keras

from offstep import catalog, commit, ownership, policy
from offstep.callbacks import ModelCheckpoint
from offstep.cards import describe_saves, make_card
from offstep.holders import own_path
from offstep.keras_hooks import has_own_hooks
from offstep.options import Layout, Mode, OnBusy, OnError
from offstep.stores.address import Address, Place, split_query, to_place
from offstep.stores.path import StorePath, open_place

Logs = Mapping[str, Any]  # floats, or whatever another callback put there


class BackupAndRestore(keras.callbacks.BackupAndRestore):  # type: ignore[misc]  # Keras carries no types
    """Saves the state of a training while it goes on, and continues an interrupted one at the batch where it was.

    A drop-in for `keras.callbacks.BackupAndRestore`. The same script, started again after a kill, ends with the same
    bits as if it had not been killed: weights, optimizer, metrics of the running epoch, random generators (the
    layers', Python's, NumPy's and Keras's), the order of the data and the position in it, the history, and what the
    other callbacks know. What cannot be continued exactly is told once, in a warning.

    Args:
        backup_dir: Directory of the backups, or its address in a store. It belongs to this callback alone.
        save_freq: `"epoch"`, a number of batches, or `False` to restore only.
        double_checkpoint: Keep the backup before the newest too.
        delete_checkpoint: Delete the backups when the training is finished.
        mid_epoch: Go on within the interrupted epoch. `False` begins it again with what it had learned, as Keras does.
        memory_every: Beside `save_freq`, keep a snapshot in memory every so many batches, which costs a copy and no
            writing: see `ModelCheckpoint`. With 1, at most one batch is lost.
        memory_linger: See `ModelCheckpoint`, as for all that follow.
        layout: Where several processes train: with `"local"` process i has its backups in `process_<i>` in the
            directory, on a disk of its own.

    Raises:
        ValueError: an argument is out of range; the message ends in what was received.

    Example:
        >>> callback = BackupAndRestore("backup", save_freq=100)
    """

    def __init__(
        self,
        backup_dir: str | os.PathLike[str],
        save_freq: str | int = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
        *,
        mid_epoch: bool = True,
        memory_every: int | None = None,
        memory_linger: str | float = "10min",
        slots: int = 2,
        on_busy: OnBusy = "wait",
        on_error: OnError = "raise",
        memory_budget: int | None = None,
        copy_threads: int = 2,
        snapshot_mode: Mode | None = None,
        in_process: bool = False,
        retry_seconds: float = 30.0,
        takeover: bool = False,
        commit_seconds: float = 300.0,
        layout: Layout = "shared",
        event_log: str | os.PathLike[str] | None = None,
    ) -> None:
        keras.callbacks.Callback.__init__(self)
        _check(backup_dir, save_freq)
        self.async_safe = has_own_hooks(self, BackupAndRestore)  # see `ModelCheckpoint`
        if keras.backend.backend() != "jax":
            raise ValueError(f"BackupAndRestore needs Keras on JAX. Received: Keras on {keras.backend.backend()}")
        self.save_freq = save_freq
        self.double_checkpoint = double_checkpoint
        self.delete_checkpoint = delete_checkpoint
        self.backup_dir = os.fspath(backup_dir)
        self._has_own_disk = layout == "local"
        self._place = self._find_place()  # fixed when training begins, whatever the working directory is later
        self._current_epoch = 0
        self._last_batch_seen = 0
        self._saver = ModelCheckpoint(
            _make_template(self.backup_dir),
            monitor="",  # a backup is the newest, and no other stays beside it because it was better
            mode="min",
            save_freq=save_freq or _NEVER,
            max_to_keep=2 if double_checkpoint else 1,
            slots=slots,
            on_busy=on_busy,
            on_error=on_error,
            memory_budget=memory_budget,
            copy_threads=copy_threads,
            snapshot_mode=snapshot_mode,
            in_process=in_process,
            retry_seconds=retry_seconds,
            takeover=takeover,
            commit_seconds=commit_seconds,
            layout=layout,
            memory_every=memory_every,
            memory_linger=memory_linger,
            event_log=event_log,
            resume=True,
        )
        self._saver.resume_for(self, mid_epoch=mid_epoch)

    def _repr_html_(self) -> str:
        return make_card(type(self).__name__, self.backup_dir, describe_saves(self._saver.stats, self._saver.counts))

    @property
    def saver(self) -> ModelCheckpoint:
        """The callback that makes the backups: its `stats` and `counts` say what they cost."""
        return self._saver

    # ---------------------------------------------------------------------------------------------------- hooks

    def set_model(self, model: Any) -> None:
        """Takes the model."""
        super().set_model(model)
        self._saver.set_model(model)

    def set_params(self, params: dict[str, Any]) -> None:
        """Takes the parameters of `fit`."""
        super().set_params(params)
        self._saver.set_params(params)

    def on_train_begin(self, logs: Logs | None = None) -> None:
        """Reads the newest backup, if there is one."""
        place = self._find_place()
        self._place = place.absolute() if isinstance(place, Path) else place
        self._saver.on_train_begin(logs)

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        """Notes the epoch."""
        self._saver.on_epoch_begin(epoch, logs)

    def on_train_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        """Saves what was due after the batch before."""
        self._saver.on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        """Saves if due."""
        if self.save_freq != "epoch":
            self._last_batch_seen = batch
        self._saver.on_train_batch_end(batch, logs)

    def on_test_begin(self, logs: Logs | None = None) -> None:
        """Saves what is due after the last batch of an epoch."""
        self._saver.on_test_begin(logs)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Saves if due."""
        self._current_epoch = epoch + 1
        self._last_batch_seen = 0
        self._saver.on_epoch_end(epoch, logs)

    def on_train_end(self, logs: Logs | None = None) -> None:
        """Waits until everything is durable; then deletes it, unless it shall be kept.

        Of several processes each waits for all others first: one that is started again needs the backups.
        """
        is_locked = self._saver.writes_common
        with _locked(self._place) if is_locked else nullcontext(lambda: False) as is_ours:
            self._saver.on_train_end(logs)
            if self.delete_checkpoint and self._saver.have_all_ended() and is_ours():
                _delete(self._place)
                if self._has_own_disk:
                    _delete_if_empty(Path(self.backup_dir))

    def _find_place(self) -> Place:
        return to_place(own_path(self.backup_dir) if self._has_own_disk else self.backup_dir)

    def get_state(self) -> dict[str, Any]:
        """Returns what a resumed training has to know of this callback."""
        return self._saver.get_state() | {"current_epoch": self._current_epoch, "last_batch": self._last_batch_seen}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Puts back what `get_state` returned."""
        self._saver.set_state(state)
        self._current_epoch, self._last_batch_seen = state["current_epoch"], state["last_batch"]

    # ------------------------------------------------------------------- where stock has its files: the same kinds

    @property
    def _weights_path(self) -> str:
        return self._find(0, "pytree/manifest.ocdbt")

    @property
    def _training_metadata_path(self) -> str:
        return self._find(0, "offstep.json")

    @property
    def _prev_weights_path(self) -> str:
        return self._find(1, "pytree/manifest.ocdbt")

    @property
    def _prev_training_metadata_path(self) -> str:
        return self._find(1, "offstep.json")

    def _find(self, age: int, file: str) -> str:
        self._saver.wait_until_finished()
        steps = [0, 0, *catalog.list_steps(open_place(self._place))]
        return str(self._place / str(steps[-1 - age]) / file)


_NEVER = 1 << 62


def _check(backup_dir: str | os.PathLike[str], save_freq: object) -> None:
    if not backup_dir:
        raise ValueError(f"Empty `backup_dir` argument passed. Received: backup_dir={backup_dir!r}")
    if save_freq != "epoch" and not isinstance(save_freq, int):
        raise ValueError(
            f"Invalid value for argument `save_freq`. Received: save_freq={save_freq}. "
            "Expected either 'epoch' or an integer value."
        )


def _make_template(backup_dir: str) -> str:
    plain, options = split_query(backup_dir)
    escaped = plain.rstrip("/").replace("{", "{{").replace("}", "}}")
    return f"{escaped}/{policy.STEP_FIELD}{options}"


@contextmanager
def _locked(directory: Place) -> Iterator[Callable[[], bool]]:
    """Keeps the directory for this process beyond the end of its saves; yields whether it still is ours.

    A store has no locks: whose a prefix is, the user says.
    """
    if isinstance(directory, Address):
        yield lambda: True
        return
    if not directory.is_dir():
        yield lambda: False
        return
    lock = ownership.acquire(ownership.lock_path(directory))

    def is_ours() -> bool:
        if not ownership.is_taken_over(lock.path, lock.descriptor):
            return True
        text = f"another run has taken {directory} over: the backups are its own now, and stay"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return False

    try:
        yield is_ours
    finally:
        ownership.release(lock)


def _delete_if_empty(directory: Path) -> None:
    with suppress(OSError):  # of processes on one host another one may have done so, or still be at it
        if not any(directory.iterdir()):
            commit.remove_directory(directory)


def _delete(place: Place) -> None:
    """Deletes the backups, damaged ones too, and the directory if nothing else is in it; it is locked."""
    if isinstance(place, Address):
        _delete_objects(place)
    else:
        _delete_directory(place)


def _delete_objects(place: Address) -> None:
    """Deletes the backups in a store, as far as it lets that happen: that is no reason for `fit` to fail now."""
    root = StorePath(place)
    try:
        for step in catalog.named_steps(root):
            (root / str(step)).remove_own()
    except OSError as error:
        text = f"the training is finished, but its backups could not be deleted: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def _delete_directory(directory: Path) -> None:
    for path in (directory / str(step) for step in catalog.named_steps(directory)):
        with suppress(FileExistsError):  # what is no checkpoint is somebody else's
            commit.refuse_foreign(path)
            if path.is_dir() and not path.is_symlink():
                commit.remove_directory(path)
    lock_path = ownership.lock_path(directory)
    if all(entry == lock_path for entry in lock_path.parent.iterdir()):
        commit.remove_directory(directory)
