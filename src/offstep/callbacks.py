"""The Keras callback: Keras events in, engine calls out."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import keras

from offstep import keras_formats, keras_state, ownership, policy, recovery, retention
from offstep.attachments import Attachment, packable_items
from offstep.batches import Dispatch, Logs, StepCounter, plain_numbers
from offstep.cards import describe_saves, make_card
from offstep.checkpointer import check_full_every, check_remote, refuse_spanning
from offstep.destination import Destination
from offstep.engine import Engine
from offstep.errors import SaveFailed, SaveTimeout
from offstep.holders import spans_processes
from offstep.keras_decisions import DecidingCheckpoint, Stock
from offstep.keras_resume import Event, Moment, Resumption
from offstep.observation import Observer, OnDurable, describe_costs
from offstep.options import Mode, OnBusy, OnError, Options
from offstep.pending import PendingSave
from offstep.preemption import Preemption
from offstep.records import SaveStats, Target
from offstep.reports import Counts

_VERSIONS = {"keras": keras.__version__, "jax": version("jax")}  # read once: it takes longer than a small snapshot
_BATCH_ENDS = ("on_batch_end", "on_train_batch_end", "on_test_batch_end", "on_predict_batch_end")
_LED_BY = (
    "on_train_begin",
    "on_epoch_begin",
    "on_batch_begin",
    "on_train_batch_begin",
    "on_test_begin",
    "on_epoch_end",
)

_REMEMBERED = (
    "best",
    "_current_epoch",
    "_batches_seen_since_last_saving",
    "_last_batch_seen",
)


class ModelCheckpoint(DecidingCheckpoint):
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
            let the signal do what it would have done. Wants fields of epoch, batch and step only in `filepath`.
        preemption_seconds: How long after SIGTERM that has to be done.
        commit_seconds: Where several processes train (`jax.distributed`): how long after its snapshot a save may take
            until all have written their shares. After that it fails, and names who is missing.
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
        event_log: A file, `"offstep-events.jsonl"` say, to which a line of JSON is appended for each snapshot and what
            became of it.

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
        clock: Callable[[], float] = time.monotonic,
        resume: bool = False,
        exit_seconds: float = 300.0,
        private: bool = False,
        save_on_preemption: bool = False,
        preemption_seconds: float = 25.0,
        memory_every: int | None = None,
        memory_linger: str | float = "10min",
        on_durable: OnDurable | None = None,
        event_log: str | os.PathLike[str] | None = None,
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
        self._max_to_keep, self._keep_best, self._keep_every = max_to_keep, keep_best or 1, keep_every
        self.filepath = filepath
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
            memory_every=memory_every,
            memory_linger_seconds=policy.parse_seconds(memory_linger, "memory_linger"),
        )
        if skip_unchanged and (self._destination.is_file or self._destination.is_remote):
            raise ValueError(f"skip_unchanged works for directories, which share files. Received: filepath={filepath}")
        if self._destination.is_remote:
            check_remote(private=private, takeover=takeover)
        if resume_best and not self._destination.is_constant:
            raise ValueError(f"resume_best needs a directory whose name has no fields. Received: filepath={filepath}")
        self._resumes_best, self._takeover = resume_best, takeover
        self._skip_unchanged = skip_unchanged
        self._engine = Engine(options, on_durable=self._say_durable)
        self._observer = Observer(event_log, on_durable, is_live=verbose > 1)
        # Snapshots are taken in hooks that Keras always calls on the training thread. Where its dispatch calls
        # `on_train_batch_end` from a pool, that hook only takes notes, so the pool need not be switched off. The hooks
        # of a subclass know nothing of that, and may keep ours from being called: they are called as those of stock's
        # subclasses are.
        self.async_safe = has_own_hooks(self, ModelCheckpoint) and keras.backend.backend() == "jax"
        self._current_epoch = 0
        self._order: tuple[int, ...] = ()  # which live array each leaf is
        self._iteration_index: int | None = None
        self._signature: object = None
        self._event: Event = "epoch_end"  # the hook that a save is made in
        self._epoch_logs: Logs | None = None
        self._steps = StepCounter()
        self._unjudged: deque[tuple[PendingSave, int]] = deque()  # with the number of batches counted until then
        self._has_begun = self._is_in_fit = self._as_trained = False
        self._dispatch = Dispatch()
        self._resumption = _make_resumption(self) if resume else None
        self._preemption: Preemption | None = None
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
        nothing: dict[str, Any] = dict.fromkeys(("_signature", "_epoch_logs"))
        nothing |= dict.fromkeys(("_has_begun", "_is_in_fit", "_as_trained"), False)
        return self.__dict__ | nothing | {"_unjudged": deque()}

    # Keras's constructor sets the filepath before the rest.
    save_weights_only = False
    _max_to_keep: int | None = None

    @property
    def filepath(self) -> str:
        """The template of the path; another one may be set between two saves."""
        return self._destination.template.text

    @filepath.setter
    def filepath(self, filepath: str | os.PathLike[str]) -> None:
        self._destination = Destination(
            os.fspath(filepath), weights_only=self.save_weights_only, keep=self._max_to_keep
        )

    # ------------------------------------------------------------------------------------------------- outcomes

    @property
    def stats(self) -> list[SaveStats]:
        """What each save cost, oldest first."""
        return self._engine.stats

    @property
    def counts(self) -> Counts:
        """How many saves were requested, became durable, failed, were skipped."""
        return self._engine.counts

    def _repr_html_(self) -> str:
        return make_card(type(self).__name__, self.filepath, describe_saves(self.stats, self.counts))

    def wait_until_finished(self, timeout: float | None = None) -> None:
        """Waits until everything saved so far is durable.

        Raises:
            SaveFailed: a save failed.
            SaveTimeout: `timeout` seconds ran out; it names the steps that are not durable, and the newest that is.
                The saves go on.
        """
        self._engine.wait(timeout)

    # ---------------------------------------------------------------------------------------------------- hooks

    def set_model(self, model: Any) -> None:  # Keras carries no types
        """Takes the model to save; what PyTorch distributes it with is taken off."""
        super().set_model(model)
        self._model = self.model
        if type(self).on_train_begin is not ModelCheckpoint.on_train_begin:  # ours may never come
            self._dispatch.take_thread()

    def on_train_begin(self, logs: Logs | None = None) -> None:
        """Checks the target, and gets ready for the first save if one is near."""
        self._dispatch.begin_training()
        self._begin()
        if self._resumption is not None:
            self._resumption.begin(self._model, self.filepath)
            self._correct_steps()
        self._watch()

    def _begin(self) -> None:
        self._is_in_fit = keras_state.is_in_fit(self._model)
        self._schedule.begin()
        self._destination.fix()
        if self._resumes_best:
            self._resume_best(self._destination.read_manifests())
        self._observer.begin(filepath=self.filepath, versions=_VERSIONS)
        if self._may_save() or self._preemption is not None or self._resumption is not None:
            self._open()  # else it is done by a save that comes nevertheless
        self._get_ready()
        self._has_begun = True

    def _get_ready(self) -> None:
        """Warms up what the next save needs, if one is near: who never saves shall not pay for it."""
        if not self._engine.is_ready and (self._preemption is not None or self._is_save_near()):
            self._engine.make_ready()

    def _watch(self) -> None:
        if self._preemption is not None:
            self._preemption.watch(self._is_training)

    def _begin_late(self) -> None:
        """Begins where a loop by hand, or a subclass, has not passed `on_train_begin` on.

        Raises:
            RuntimeError: the training should have been resumed, for which it is too late.
        """
        if self._has_begun:
            return
        if self._resumption is not None:
            raise RuntimeError(
                "on_train_begin did not come, so that the training cannot be resumed. A subclass has to call "
                "super().on_train_begin(logs), and a loop the callback's hook."
            )
        self._begin()
        self._watch()

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        """Notes the epoch."""
        self._begin_late()
        super().on_epoch_begin(epoch, logs)
        self._dispatch.begin_epoch()
        if self._frequency is not None:
            self._frequency.resume()
        self._steps.begin_epoch()
        self._correct_steps()
        if self._resumption is not None:
            self._resumption.begin_epoch(epoch)

    def on_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        """Does what was due after the batch before, while its state still exists.

        Keras's `on_train_batch_begin` calls it.
        """
        if self._resumption is not None and self._resumption.begin_batch():
            self._dispatch.begin_batch(batch, None)
            self._dispatch.end_batch()
            return
        self._catch_up("train_batch_begin")
        self._dispatch.begin_batch(batch + self._steps_per_execution - 1, keras_state.last_step_id(self._model))
        self._observer.begin_batch()

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        """Saves if due; on a thread of Keras's pool it only notes the logs."""
        if self._resumption is not None and self._resumption.is_standing_in:
            if self._dispatch.is_training_thread():
                self._resumption.settle()
        elif self._dispatch.is_training_thread():
            self._dispatch.end_batch()
            self._after_batch("train_batch_end", batch, logs)
        elif self._decides_on_batches:
            self._dispatch.note(batch, dict(logs or {}))

    def on_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        """Does what `on_train_batch_end` does, of which it is Keras's older name; `fit` never calls it."""
        ModelCheckpoint.on_train_batch_end(self, batch, logs)

    def on_test_begin(self, logs: Logs | None = None) -> None:
        """Saves what is due after the last batch of an epoch, before validation resets the metrics."""
        if self._resumption is not None:
            self._resumption.settle()
        if self._has_ended():
            self._catch_up("test_begin")
        self._observer.hide()
        self._pause()

    def on_test_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        """Saves before the process is terminated, rather than after the validation."""
        self._obey_preemption(self._steps.last_batch)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Saves if due."""
        if self._resumption is not None:
            self._resumption.settle()
        self._event, self._epoch_logs = "epoch_end", logs
        if self._has_ended():
            self._catch_up("epoch_end")
        self._dispatch.end_batch()
        self._correct_steps()
        super().on_epoch_end(epoch, logs)  # saves if `save_freq` is "epoch"
        if self.save_freq != "epoch" and self._schedule.is_due_after_epoch():
            self._save_model(epoch=epoch, batch=None, logs=logs)
        self._poll()
        self._pause()
        stall_ms = self._observer.end_epoch(epoch + 1)
        if self.verbose > 1 and isinstance(logs, dict):
            logs["offstep_stall_ms"] = stall_ms
        self._obey_preemption(None if self.save_freq == "epoch" else self._steps.last_batch)

    def on_train_end(self, logs: Logs | None = None) -> None:
        """Waits until everything is durable, and frees the slots."""
        if self._has_ended():
            self._catch_up("epoch_end")
        self._obey_preemption(self._steps.last_batch)
        if self._resumption is not None:
            self._resumption.end()
        self._engine.forget_kept()
        self._engine.close()
        if self._preemption is not None:
            self._preemption.stop_watching()
        self._observer.end()
        self._has_begun = False
        self._engine.raise_failures()

    def _poll(self) -> None:
        """Takes in what has become of saves, and passes it on."""
        try:
            self._engine.poll()
        finally:
            self._observer.settle()

    def _has_ended(self) -> bool:
        return self._dispatch.has_ended(keras_state.last_step_id(self._model))

    def _catch_up(self, event: Event) -> None:
        batch = self._dispatch.end_batch()
        if batch is None:
            return
        # In `fit`, hooks of other callbacks may have changed the model since the batch ended; a loop driven by hand
        # may change it before it says that the batch has ended. A training that is resumed goes on with their changes.
        self._as_trained = self._is_in_fit and self._resumption is None
        try:
            self._after_batch(event, batch, None)
        finally:
            self._as_trained = False

    def _after_batch(self, event: Event, batch: int, logs: Logs | None) -> None:
        self._event = event
        self._poll()
        self._steps.count(batch)
        is_due = self._should_save_on_batch(batch)
        if is_due:
            if logs is None and self._needs_logs:
                self._correct_steps()
                logs = self._dispatch.wait_for_logs(batch)
            self._save_model(epoch=self._current_epoch, batch=batch, logs=logs)
        else:
            self._keep_in_memory(batch)
            self._get_ready()
        self._observer.end_batch(self._steps.current)
        self._obey_preemption(None if is_due else batch)

    # ---------------------------------------------------------------------------------------------- preemption

    def _is_training(self) -> bool:
        return not self._is_in_fit or keras_state.is_in_fit(self._model)

    def _obey_preemption(self, batch: int | None) -> None:
        """Once SIGTERM has come: saves (unless `batch` is `None`: that was just done), waits, and lets it act."""
        preemption = self._preemption
        if preemption is None or not preemption.is_due:
            return
        try:
            if batch is not None and batch >= 0:
                self._save_model(self._current_epoch, batch, None)
            self._engine.wait(preemption.remaining_seconds)
        except (SaveFailed, SaveTimeout) as error:
            print(f"offstep: at SIGTERM: {error}", file=sys.stderr)
        preemption.hand_over()  # where that lets training go on, it watches further

    def _check_can_save_any_batch(self, name: str) -> None:
        if self.save_best_only:
            raise ValueError(f"{name} saves what there is, not the best. Received: save_best_only=True")
        if self._destination.template.fields - {"epoch", "batch", "step"}:
            raise ValueError(
                f"{name} wants no other fields than epoch, batch and step in filepath: it cannot wait for "
                f"metrics. Received: filepath={self.filepath}"
            )

    # ------------------------------------------------------------------------------------------------- deciding

    @property
    def _needs_logs(self) -> bool:
        has_fields = self._destination.template.fields - {"epoch", "batch", "step"}
        return bool(self.save_best_only or has_fields or self._is_overridden)

    @property
    def _is_overridden(self) -> bool:
        """Whether a subclass decides, or names, by means of its own."""
        own = (ModelCheckpoint._get_file_path, ModelCheckpoint._should_save_model, ModelCheckpoint._save_model)
        return (type(self)._get_file_path, type(self)._should_save_model, type(self)._save_model) != own

    def _get_file_path(self, epoch: int, batch: int | None, logs: Logs | None) -> str:
        return self._destination.template.format(self._fields(epoch, batch, logs))

    def _fields(self, epoch: int, batch: int | None, logs: Logs | None) -> dict[str, Any]:
        counted = {} if batch is None else {"batch": batch + 1}
        return counted | dict(logs or {}) | {"epoch": epoch + 1, "step": self._steps.current}

    # --------------------------------------------------------------------------------------------------- saving

    def _save_model(self, epoch: int, batch: int | None, logs: Logs | None) -> None:
        started = time.monotonic()
        self._engine.poll()
        self._begin_late()
        if not self._destination.is_fixed():
            self._destination.fix()
        if self._signature is None:
            self._open()
        before = time.monotonic()
        if not self._counts_exactly:
            self._correct_steps()
        compute_seconds = time.monotonic() - before
        filepath = self._get_file_path(epoch, batch, logs)
        best: Any = self.best  # a number of Keras, or None
        if not self._should_save_model(epoch, batch, logs, filepath):
            self._get_ready()
            return
        self._destination.refuse_directory(filepath)
        arrays = self._live_arrays()
        pending = self._engine.save(
            arrays,
            self._steps.current,
            self._place(filepath, epoch, batch, logs),
            step_leaf=self._iteration_index,
            step_divisor=self._steps.divisor,
            manifest=_describe_moment(epoch, batch, logs),
            ranking=self._rank(self._keep_best, self._keep_every),
            attachments=self._pack_extra(epoch, batch, logs),
            note=f"\nEpoch {epoch + 1}: finished saving model to {filepath}",
            started=started,
            compute_seconds=compute_seconds,
            must_save=self._preemption is not None and self._preemption.is_due,
        )
        if pending is None:
            self.best = best  # the next one has to beat what is on the disk
            self._observer.skip(self._steps.current, filepath)
            return
        self._kept_at = self._steps.counted
        self._tell_if_step_stays(pending)
        self._destination.remember(pending)
        self._observer.follow(pending)
        if self._frequency is not None:
            self._frequency.note_call(pending.stats.call_seconds, pending.stats.compute_seconds)

    def _keep_in_memory(self, batch: int) -> None:
        if self._memory_every is None or self._steps.counted - self._kept_at < self._memory_every:
            return
        arrays = self._live_arrays()
        if not self._counts_exactly:
            self._correct_steps()
        epoch = self._current_epoch
        is_kept = self._engine.keep(
            arrays,
            self._steps.current,
            self._place(self._get_file_path(epoch, batch, None), epoch, batch, None),
            step_leaf=self._iteration_index,
            step_divisor=self._steps.divisor,
            manifest=_describe_moment(epoch, batch, None),
            ranking=self._rank(self._keep_best, self._keep_every),
            attachments=lambda: self._pack_extra(epoch, batch, None),
        )
        if is_kept:
            self._kept_at = self._steps.counted

    def _tell_if_step_stays(self, pending: PendingSave) -> None:
        """Says that the optimizer does not count, as where `train_step` has optimizers of its own."""
        is_backup = self._resumption is not None and self._resumption.owner is not self  # which has one place anyway
        if is_backup or "step" not in self._destination.template.fields:
            return
        self._unjudged.append((pending, self._steps.counted))
        while len(self._unjudged) > 1 and self._unjudged[1][0].wait_until_submitted(0):  # then its step is known
            (older, before), (newer, now) = self._unjudged.popleft(), self._unjudged[0]
            if older.step == newer.step == 0 and now - before >= self._steps.divisor and self._counts_exactly:
                self._tell_once(
                    f"The step of two saves is {newer.step}, though {now - before} batches were trained between them: "
                    "this model does not count in `optimizer.iterations`. Each save replaces the one before; "
                    "name them by {epoch}, or by {epoch} and {batch}."
                )

    def _is_writing(self) -> bool:
        return self._engine.is_writing

    def _place(self, filepath: str, epoch: int, batch: int | None, logs: Logs | None) -> Callable[[int], Target]:
        if type(self)._get_file_path is not ModelCheckpoint._get_file_path:
            return self._destination.place_at(filepath, self._steps.current)
        return self._destination.place(self._fields(epoch, batch, logs))

    def _live_arrays(self) -> list[Any]:
        arrays, signature = self._read_state()
        if signature != self._signature or not self._engine.matches(self._arrange(arrays)):
            self._open()
        return self._arrange(arrays)

    def _arrange(self, arrays: list[Any]) -> list[Any]:
        return [arrays[number] for number in self._order]

    def _hold(self) -> ownership.Lock:
        lock_path = self._destination.lock_path()
        assert lock_path is not None, "only what is not in a store is locked"
        return recovery.hold(lock_path, takeover=self._takeover, policy=self._describe_policy())

    def _describe_policy(self) -> ownership.Policy | None:
        if not self._destination.is_constant:
            return None
        ranking = None if self._max_to_keep is None else (self.monitor, self._keep_best, self._keep_every)
        return ownership.Policy(
            self._destination.holds_one_step,
            self._max_to_keep,
            ranking,
            self.save_weights_only,
            self._resumption is not None,
        )

    def _read_state(self) -> tuple[list[Any], object]:
        # The files of Keras have the optimizer too.
        weights_only = self.save_weights_only and not self._destination.is_file
        arrays, signature = keras_state.live_state(self._model, weights_only=weights_only, as_trained=self._as_trained)
        return arrays, (signature, self._destination.format, self._destination.lock_path() or self.filepath)

    def _open(self) -> None:
        arrays, self._signature = self._read_state()
        form = keras_formats.describe_form(
            self._model,
            arrays,
            self._destination.format,
            weights_only=self.save_weights_only,
            skip_unchanged=self._skip_unchanged,
        )
        if any(map(spans_processes, arrays)):
            self._refuse_own_decisions()
            if self._destination.is_remote:
                refuse_spanning(arrays, self.filepath)
        for note in form.notes:
            self._tell_once(note)
        self._order, self._iteration_index = form.order, form.iteration_index
        self._engine.open(
            form.leaves,
            self._arrange(arrays),
            format=form.format,
            empty_nodes=form.empty_nodes,
            documents=form.documents,
            rendering=form.rendering,
            owner=self,
            hold=None if self._destination.is_remote else self._hold,
        )
        self._steps.divisor = keras_state.batches_per_iteration(self._model)
        self._correct_steps()

    def _refuse_own_decisions(self) -> None:
        """Raises a `ValueError` where several processes would not all decide to save the same steps."""
        rule = "several processes have to save the same steps, so that none may decide by what only it can tell"
        if self._decides_by_clock:
            raise ValueError(
                f"{rule}: a clock. Give save_freq in batches or epochs. Received: save_freq={self.save_freq!r}"
                + ("" if self._frequency is None else " and overhead_budget")
            )
        if self._preemption is not None:
            raise ValueError(f"{rule}: a signal. Received: save_on_preemption=True")

    def _correct_steps(self) -> None:
        """Waits for the last step to be computed; between epochs that costs nothing worth mentioning."""
        self._steps.correct(keras_state.read_iterations(self._model, as_trained=self._as_trained))

    # ------------------------------------------------------------------------------------------------- resuming

    def resume_for(self, owner: keras.callbacks.Callback, *, mid_epoch: bool) -> None:
        """Resumes trainings in which `owner` is in the list of callbacks and passes its hooks on to this one."""
        self._resumption = Resumption(owner, self._tell_once, mid_epoch=mid_epoch)

    def get_state(self) -> dict[str, Any]:
        """Returns what a resumed training has to know of this callback: numbers and texts."""
        steps = self._steps
        return {name: getattr(self, name) for name in _REMEMBERED} | {"_steps": (steps.batches, steps.last_batch)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Puts back what `get_state` returned."""
        self._steps.batches, self._steps.last_batch = state["_steps"]
        for name in _REMEMBERED:
            setattr(self, name, state[name])

    def _pack_extra(self, epoch: int, batch: int | None, logs: Logs | None) -> dict[str, Attachment]:
        if self._resumption is None:
            return {}
        logs = self._epoch_logs if self._event == "epoch_end" else logs
        return self._resumption.pack(Moment(self._event, epoch, batch, packable_items(logs)))

    # -------------------------------------------------------------------------------------------------- talking

    def _say_durable(self, pending: PendingSave) -> None:
        if self._frequency is not None and pending.stats.durable_seconds is not None:
            self._frequency.note_durable(pending.stats.durable_seconds - pending.stats.compute_seconds)
        if self.verbose > 0:
            self._print(pending.note)
        if self.verbose > 1:
            self._print(describe_costs(pending.stats))

    def _print(self, text: str) -> None:
        self._observer.hide()
        super()._print(text)


def _describe_moment(epoch: int, batch: int | None, logs: Logs | None) -> dict[str, Any]:  # JSON
    return {
        "epoch": epoch + 1,
        "batch": None if batch is None else batch + 1,
        "metrics": plain_numbers(logs or {}),
        "versions": _VERSIONS,
    }


def has_own_hooks(callback: keras.callbacks.Callback, cls: type) -> bool:
    """Returns whether all hooks that saving relies on are those of `cls`, rather than of a subclass of it."""
    return all(getattr(type(callback), name) is getattr(cls, name) for name in (*_BATCH_ENDS, *_LED_BY))


def _make_resumption(callback: ModelCheckpoint) -> Resumption:
    if callback.save_weights_only:
        raise ValueError("resume=True needs the optimizer's state too. Received: save_weights_only=True")
    if callback._destination.is_file:
        raise ValueError(f"resume=True needs a directory, such as 'ckpts/{{step}}'. Received: {callback.filepath}")
    if keras.backend.backend() != "jax":
        raise ValueError(f"resume=True needs Keras on JAX. Received: Keras on {keras.backend.backend()}")
    return Resumption(callback, callback._tell_once)
