"""The Keras callback: Keras events in, engine calls out."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import keras

from offstep import policy, retention
from offstep.batches import Dispatch, StepCounter
from offstep.checkpointer import check_full_every, check_remote
from offstep.engine import Engine
from offstep.holders import own_path
from offstep.keras_decisions import Stock
from offstep.keras_hooks import HookedCheckpoint, has_own_hooks
from offstep.keras_resume import Resumption
from offstep.observation import Observer, OnDurable
from offstep.options import Layout, Mode, OnBusy, OnError, Options
from offstep.preemption import Preemption
from offstep.tiers import make_tiers

_REMEMBERED = (
    "best",
    "_current_epoch",
    "_batches_seen_since_last_saving",
    "_last_batch_seen",
)


class ModelCheckpoint(HookedCheckpoint):
    """Saves a Keras model while it trains, without making the training step wait for the disk.

    The arguments up to `initial_value_threshold`, the messages and the decisions are those of
    `keras.callbacks.ModelCheckpoint`. So are the files: `.weights.h5` with `save_weights_only`, else `.keras` or `.h5`.
    With any other suffix the whole state (weights, optimizer, metrics, seed generators) is saved in a directory that
    `keras.saving.load_model`, `model.load_weights` and Orbax read.

    Args:
        filepath: Template of the path, e.g. `"ckpts/{step}"`, or of an address in a store, e.g.
            `"s3://bucket/run/{step}"` or `"gs://bucket/run/{step}"`. Fields: `{epoch}` and `{batch}` (from 1), `{step}`
            (`optimizer.iterations`) and the keys of `logs`. For a directory: with the last part `{step}` the directory
            above holds all steps; any other path holds one step, which the next save to it replaces. Load either with
            `keras.saving.load_model(directory that holds the steps)`.
        monitor: Name of the metric that decides what is best.
        verbose: 0 is silent, 1 prints Keras's lines. 2 adds what each save has cost once it is durable, and puts the
            milliseconds for which saves stalled an epoch into its `logs["offstep_stall_ms"]`, for the callbacks after
            this one; where somebody looks on, a line says which saves are on their way.
        save_best_only: Save only what is better than everything before.
        save_weights_only: Leave out optimizer, metrics and model configuration.
        mode: `"auto"`, `"min"` or `"max"`.
        save_freq: `"epoch"`, or a number of batches; also `"5 epochs"`, `"500 batches"`, or a time such as `"30s"`,
            `"10min"`, `"2h"`: then at the end of the first batch after it has passed.
        initial_value_threshold: What the first best has to beat.
        max_to_keep: How many of the newest steps of a directory stay, or of the files that this run saved; `None`
            keeps all. In a directory the best by `monitor` stays beside them, and a step with NaN or infinite values
            never retires one without.
        keep_best: How many of the best steps of a directory stay; 1 unless given.
        keep_every: Steps that are multiples of it stay as well.
        resume_best: Begin with the best value of `monitor` that the directory has, so that a run which is continued
            does not save as best what is worse; by default the first value is the best, as in Keras.
        slots: How many snapshots may be on their way at once; each takes host memory of the size of the state.
        on_busy: When all slots are on their way: `"wait"` for one, `"skip"` the save, or let the `"latest"` replace
            the oldest that the writer has not begun (needs two slots). What is dropped is counted, and said once.
        on_error: Whether a save that failed in the background is raised by the next hook, or only warned of.
        memory_budget: Most bytes of host memory for slots; `None` takes 80 % of what is available.
        copy_threads: Threads that copy a snapshot on the CPU backend.
        snapshot_mode: `"host"`, `"device_copy"` or `"transfer"`; `None` chooses by the devices and their free memory.
        in_process: Write in a thread rather than in a process of its own.
        skip_unchanged: Do not write frozen weights again: each checkpoint links a file with the variables that are not
            trainable and have not changed since the first save. Two checkpoints then share these bytes on the disk.
        full_every: With `skip_unchanged`, each how many saves everything is written anew; `None` only when it must be.
        overhead_budget: Instead of `save_freq`: as often as possible while saving takes at most this share of the time,
            `"1%"` or 0.01, and each checkpoint is durable before the next one. After three trial saves a line says how
            often that is and why, and again when it changes.
        retry_seconds: How long a save that fails for want of space, or is interrupted, is tried again before that is
            an error; later saves wait for it.
        exit_seconds: How long the end of the process waits for saves; what is not durable by then is said.
        private: Only the owner of the process may read the checkpoints (modes 0600 and 0700); else the umask decides.
        save_on_preemption: When SIGTERM comes, save at the end of the batch, wait until that is durable, and only then
            let the signal do what it would have done. Wants fields of epoch, batch and step only in `filepath`. Where
            several processes train, all save, at the next hook that all can reach, whichever of them gets the signal.
        preemption_seconds: How long after SIGTERM that has to be done.
        commit_seconds: Where several processes train (`jax.distributed`): how long after its snapshot a save may take
            until all have written their shares. After that it fails, and names who is missing.
        layout: Where several processes train: `"shared"` where all see the directory; `"local"` where each host has a
            disk of its own: then process i saves what it holds to `process_<i>` in the directory.
        takeover: Save here though another live run does, whose later saves fail; without it `fit` refuses to begin.
        clock: Returns the seconds that a time in `save_freq` is measured in; it never goes back.
        resume: Go on from the newest checkpoint of `filepath`, at the batch where it was made, as if the training had
            not been interrupted; see `BackupAndRestore`. Not with Keras's files, nor with `save_weights_only`.
        memory_every: Beside `save_freq`, keep a snapshot in memory every so many batches, which costs a copy and no
            writing. Should the process be killed, the writer makes the newest one durable, and hands it to the run
            that goes on (`resume=True`). Takes one slot more.
        memory_linger: How long the writer waits with it for that run: a time such as `"10min"`, or seconds.
        on_durable: Called with the `SaveStats` of each save that has become durable, on the training thread, which it
            holds up: hand long work (an upload) to a thread of your own, and keep the checkpoint until that is done.
        local: A directory of this machine that each step goes to first, where `filepath` is the address of the steps in
            a store. A step is durable, and a save done, once it is there; the writer then copies steps from there into
            the store while training goes on, the newest first where the store is slower than the saves. Where several
            processes train, with `layout="local"` it is on a disk of each host's own.
        upload_every: With `local`, each how many saves one is copied into the store; 1 unless given.
        local_max_to_keep: How many of the newest steps stay in `local`; `max_to_keep` is for the store then.
        event_log: A file, `"offstep-events.jsonl"` say, to which a line of JSON is appended for each snapshot and what
            became of it.
        hdf5_checksums: For a `.weights.h5`: with the checksums that HDF5 itself verifies, so that stock Keras and h5py
            refuse a file with flipped bits as well; they read it at about 2 GB/s then.

    Raises:
        ValueError: an argument is out of range; the message ends in what was received.

    Example:
        >>> callback = ModelCheckpoint("ckpts/{step}", save_freq=100, max_to_keep=3)
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        initial_value_threshold: float | None = None,
        *,
        max_to_keep: int | None = None,
        keep_best: int | None = None,
        keep_every: int | None = None,
        resume_best: bool = False,
        slots: int = 2,
        on_busy: OnBusy = "wait",
        on_error: OnError = "raise",
        memory_budget: int | None = None,
        copy_threads: int = 2,
        snapshot_mode: Mode | None = None,
        in_process: bool = False,
        skip_unchanged: bool = False,
        full_every: int | None = None,
        overhead_budget: str | float | None = None,
        retry_seconds: float = 30.0,
        takeover: bool = False,
        commit_seconds: float = 300.0,
        layout: Layout = "shared",
        clock: Callable[[], float] = time.monotonic,
        resume: bool = False,
        exit_seconds: float = 300.0,
        private: bool = False,
        save_on_preemption: bool = False,
        preemption_seconds: float = 25.0,
        memory_every: int | None = None,
        local: str | os.PathLike[str] | None = None,
        upload_every: int | None = None,
        local_max_to_keep: int | None = None,
        memory_linger: str | float = "10min",
        on_durable: OnDurable | None = None,
        event_log: str | os.PathLike[str] | None = None,
        hdf5_checksums: bool = False,
    ) -> None:
        # Keras's checks know its own files only: they see a name that suits the other arguments.
        stand_in = "model.weights.h5" if save_weights_only else "model.keras"
        super().__init__(
            stand_in,
            monitor,
            verbose,
            save_best_only,
            save_weights_only,
            mode,
            save_freq,
            initial_value_threshold,
            overhead_budget=overhead_budget,
            clock=clock,
        )
        retention.check_counts(max_to_keep=max_to_keep, keep_best=keep_best, keep_every=keep_every)
        retention.check_counts(max_to_keep=local_max_to_keep, keep_best=None, keep_every=None)
        filepath, self._second_tier = make_tiers(os.fspath(filepath), local, upload_every, max_to_keep)
        own_keep = max_to_keep if self._second_tier is None else local_max_to_keep
        self._max_to_keep, self._keep_best, self._keep_every = own_keep, keep_best or 1, keep_every
        self._has_own_disk = layout == "local"
        self.filepath = own_path(os.fspath(filepath)) if self._has_own_disk else filepath
        if self._destination.is_file:
            Stock(self._destination.plain, save_weights_only=save_weights_only)  # its checks, in its words
        check_full_every(full_every, is_skipping=skip_unchanged)
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
            memory_every=memory_every,
            memory_linger_seconds=policy.parse_seconds(memory_linger, "memory_linger"),
            copies_into_store=self._second_tier is not None,
        )
        if skip_unchanged and (self._destination.is_file or self._destination.is_remote):
            raise ValueError(f"skip_unchanged works for directories, which share files. Received: filepath={filepath}")
        if hdf5_checksums and self._destination.format != "keras_weights":
            raise ValueError(f"hdf5_checksums are for .weights.h5; the others have some. Received: filepath={filepath}")
        if self._destination.is_remote:
            check_remote(private=private, takeover=takeover)
        if resume_best and not self._destination.is_constant:
            raise ValueError(f"resume_best needs a directory whose name has no fields. Received: filepath={filepath}")
        self._resumes_best, self._takeover = resume_best, takeover
        self._skip_unchanged, self._hdf5_checksums = skip_unchanged, hdf5_checksums
        self._engine = Engine(options, on_durable=self._say_durable)
        self._observer = Observer(event_log, on_durable, is_live=verbose > 1)
        # Snapshots are taken in hooks that Keras always calls on the training thread. Where its dispatch calls
        # `on_train_batch_end` from a pool, that hook only takes notes, so the pool need not be switched off. The hooks
        # of a subclass know nothing of that, and may keep ours from being called: they are called as those of stock's
        # subclasses are.
        self.async_safe = has_own_hooks(self, ModelCheckpoint) and keras.backend.backend() == "jax"
        self._current_epoch = 0
        self._order, self._iteration_index, self._signature = (), None, None
        self._event, self._epoch_logs = "epoch_end", None
        self._steps = StepCounter()
        self._unjudged = deque()
        self._has_begun = self._is_in_fit = self._as_trained = False
        self._dispatch = Dispatch()
        self._resumption = _make_resumption(self) if resume else None
        self._preemption = self._rendezvous = None
        self._memory_every, self._kept_at = memory_every, 0  # the count of batches at the last snapshot
        if memory_every is not None:
            self._check_can_save_any_batch("memory_every")
            if not self._destination.is_constant or self._destination.is_remote:
                raise ValueError(
                    "memory_every needs a local directory, without fields but for a last one, such as 'ckpts/{step}'. "
                    f"Received: filepath={filepath}"
                )
        if save_on_preemption:
            self._check_can_save_any_batch("save_on_preemption")
            self._preemption = Preemption(preemption_seconds)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what a copy has no part in: the training that goes on, and the logs of others."""
        nothing: dict[str, Any] = dict.fromkeys(("_signature", "_epoch_logs", "_rendezvous"))
        nothing |= dict.fromkeys(("_has_begun", "_is_in_fit", "_as_trained"), False)
        return self.__dict__ | nothing | {"_unjudged": deque()}

    def _check_can_save_any_batch(self, name: str) -> None:
        if self.save_best_only:
            raise ValueError(f"{name} saves what there is, not the best. Received: save_best_only=True")
        if self._destination.template.fields - {"epoch", "batch", "step"}:
            raise ValueError(
                f"{name} wants no other fields than epoch, batch and step in filepath: it cannot wait for "
                f"metrics. Received: filepath={self.filepath}"
            )

    # ------------------------------------------------------------------------------------------------- resuming

    def resume_for(self, owner: keras.callbacks.Callback, *, mid_epoch: bool) -> None:
        """Resumes trainings in which `owner` is in the list of callbacks and passes its hooks on to this one."""
        self._resumption = Resumption(owner, self._tell_once, mid_epoch=mid_epoch)

    @property
    def writes_common(self) -> bool:
        """Whether this process has the lock of the checkpoints; of several that write one together, one has it."""
        return self._engine.writes_common

    def have_all_ended(self) -> bool:
        """Waits until all processes have ended the training that they resume, after `on_train_end`."""
        return self._resumption is None or self._resumption.have_all_ended()

    def get_state(self) -> dict[str, Any]:
        """Returns what a resumed training has to know of this callback: numbers and texts."""
        steps = self._steps
        return {name: getattr(self, name) for name in _REMEMBERED} | {"_steps": (steps.batches, steps.last_batch)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Puts back what `get_state` returned."""
        self._steps.batches, self._steps.last_batch = state["_steps"]
        for name in _REMEMBERED:
            setattr(self, name, state[name])


def _make_resumption(callback: ModelCheckpoint) -> Resumption:
    if callback.save_weights_only:
        raise ValueError("resume=True needs the optimizer's state too. Received: save_weights_only=True")
    if callback._destination.is_file:
        raise ValueError(f"resume=True needs a directory, such as 'ckpts/{{step}}'. Received: {callback.filepath}")
    if keras.backend.backend() != "jax":
        raise ValueError(f"resume=True needs Keras on JAX. Received: Keras on {keras.backend.backend()}")
    return Resumption(callback, callback._tell_once)
