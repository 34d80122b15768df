"""The hooks that Keras calls while it trains, and at which of them a checkpoint is made."""

from __future__ import annotations

import sys
from typing import Any

import keras

from offstep import keras_state
from offstep.batches import Dispatch, Logs
from offstep.errors import SaveFailed, SaveTimeout
from offstep.keras_saved_fit import Event, find_trainers
from offstep.keras_saving import VERSIONS, SavingCheckpoint
from offstep.preemption import Preemption
from offstep.rendezvous import Rendezvous

_BATCH_ENDS = ("on_batch_end", "on_train_batch_end", "on_test_batch_end", "on_predict_batch_end")
_AGREE_SHARE = 0.3  # of `preemption_seconds`: the save needs the rest
_LED_BY = (
    "on_train_begin",
    "on_epoch_begin",
    "on_batch_begin",
    "on_train_batch_begin",
    "on_test_begin",
    "on_epoch_end",
)


class HookedCheckpoint(SavingCheckpoint):
    """Saves in hooks that Keras always calls on the training thread, whatever its dispatch of callbacks.

    Attributes are set by the constructor of `ModelCheckpoint`.
    """

    _dispatch: Dispatch
    _resumes_best: bool
    _rendezvous: Rendezvous | None

    # ---------------------------------------------------------------------------------------------------- hooks

    def set_model(self, model: Any) -> None:  # Keras carries no types
        """Takes the model to save; what PyTorch distributes it with is taken off."""
        super().set_model(model)
        self._model = self.model
        if type(self).on_train_begin is not HookedCheckpoint.on_train_begin:  # ours may never come
            self._dispatch.take_thread()

    def on_train_begin(self, logs: Logs | None = None) -> None:
        """Checks the target, and gets ready for the first save if one is near."""
        self._dispatch.begin_training()
        self._begin()
        if self._resumption is not None:
            upload = None if self._second_tier is None else str(self._second_tier.address)
            self._resumption.begin(self._model, self.filepath, upload, have_own_disks=self._has_own_disk)
            self._correct_steps()
        self._get_ready()  # not before: touching the slots would take the processors from the reading
        self._watch()

    def _begin(self) -> None:
        self._is_in_fit = keras_state.is_in_fit(self._model)
        self._schedule.begin()
        self._destination.fix(self._engine.retry_seconds)
        if self._second_tier is not None:
            self._second_tier.probe(self._engine.retry_seconds)
        if self._resumes_best:
            self._resume_best(self._destination.read_manifests())
        self._observer.begin(filepath=self.filepath, versions=VERSIONS)
        if self._may_save() or self._has_to_be_ready or self._resumption is not None:
            self._open()  # else it is done by a save that comes nevertheless
        self._has_begun = True

    def _get_ready(self) -> None:
        """Warms up what the next save needs, if one is near: who never saves shall not pay for it."""
        if not self._engine.is_ready and (self._has_to_be_ready or self._is_save_near()):
            self._engine.make_ready()

    @property
    def _has_to_be_ready(self) -> bool:
        return self._preemption is not None or self._memory_every is not None

    def _watch(self) -> None:
        if self._preemption is None:
            return
        self._preemption.watch(self._is_training)
        group = find_trainers(self._model, have_own_disks=self._has_own_disk).group
        if self._rendezvous is not None:  # of a training that has ended by an exception
            self._rendezvous.end()
        if group is not None:
            self._rendezvous = Rendezvous(group, _AGREE_SHARE * self._preemption.within_seconds)

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
        self._get_ready()
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
        HookedCheckpoint.on_train_batch_end(self, batch, logs)

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
        if self._rendezvous is not None:
            self._rendezvous.end()
            self._rendezvous = None
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
        if preemption is None:
            return
        must_save, may_end = preemption.is_due, preemption.is_due
        if self._rendezvous is not None:
            must_save, may_end = self._come_by(preemption, self._rendezvous)
        try:
            if must_save and batch is not None and batch >= 0:
                self._save_model(self._current_epoch, batch, None)
            if may_end:
                self._engine.wait(preemption.remaining_seconds)
        except (SaveFailed, SaveTimeout) as error:
            if not may_end:
                raise
            print(f"offstep: at SIGTERM: {error}", file=sys.stderr)
        if may_end:
            preemption.hand_over()  # where that lets training go on, it watches further

    def _come_by(self, preemption: Preemption, rendezvous: Rendezvous) -> tuple[bool, bool]:
        """Returns whether all processes save here, and whether the signal may act here if it has come."""
        is_over = rendezvous.is_over(preemption.within_seconds)
        is_here = rendezvous.come_by(announces=preemption.is_due and not is_over)
        if preemption.is_due and rendezvous.trouble and not is_over:
            print(f"offstep: at SIGTERM: no save, the processes cannot agree: {rendezvous.trouble}", file=sys.stderr)
        return is_here, preemption.is_due and (is_here or is_over or bool(rendezvous.trouble))


def has_own_hooks(callback: keras.callbacks.Callback, cls: type) -> bool:
    """Returns whether all hooks that saving relies on are those of `cls`, rather than of a subclass of it."""
    return all(getattr(type(callback), name) is getattr(cls, name) for name in (*_BATCH_ENDS, *_LED_BY))
