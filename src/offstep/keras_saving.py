"""How a Keras model gets from `fit` to its checkpoint: which arrays, under which name, with what beside them."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import keras

from offstep import keras_formats, keras_state, ownership, recovery
from offstep.attachments import Attachment, packable_items
from offstep.batches import Logs, StepCounter, plain_numbers
from offstep.cards import describe_saves, make_card
from offstep.destination import Destination
from offstep.engine import Engine
from offstep.holders import spans_processes
from offstep.keras_decisions import DecidingCheckpoint
from offstep.keras_resume import Resumption
from offstep.keras_saved_fit import Event, Moment
from offstep.observation import Observer, describe_costs
from offstep.pending import PendingSave
from offstep.preemption import Preemption
from offstep.records import SaveStats, Target
from offstep.reports import Counts
from offstep.tiers import SecondTier

VERSIONS = {"keras": keras.__version__, "jax": version("jax")}
"""Those in every manifest; read once, since it takes longer than a small snapshot."""


class SavingCheckpoint(DecidingCheckpoint):
    """Saves the model through an engine, whenever `_save_model` is called and decides so.

    Attributes are set by the constructor of `ModelCheckpoint`.
    """

    _engine: Engine
    _observer: Observer
    _destination: Destination
    _second_tier: SecondTier | None
    _keep_best: int
    _keep_every: int | None
    _skip_unchanged: bool
    _hdf5_checksums: bool
    _takeover: bool
    _has_own_disk: bool
    _order: tuple[int, ...]  # which live array each leaf is
    _iteration_index: int | None
    _signature: object
    _event: Event  # the hook that a save is made in
    _epoch_logs: Logs | None
    _steps: StepCounter
    _unjudged: deque[tuple[PendingSave, int]]  # with the number of batches counted until then
    _has_begun: bool
    _is_in_fit: bool
    _as_trained: bool
    _resumption: Resumption | None
    _preemption: Preemption | None
    _memory_every: int | None
    _kept_at: int  # the count of batches at the last snapshot

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

    # ------------------------------------------------------------------------------------------------- deciding

    @property
    def _needs_logs(self) -> bool:
        has_fields = self._destination.template.fields - {"epoch", "batch", "step"}
        return bool(self.save_best_only or has_fields or self._is_overridden)

    @property
    def _is_overridden(self) -> bool:
        """Whether a subclass decides, or names, by means of its own."""
        own = (SavingCheckpoint._get_file_path, SavingCheckpoint._should_save_model, SavingCheckpoint._save_model)
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
            self._destination.fix(self._engine.retry_seconds)
        if self._signature is None:
            self._open()
        before = time.monotonic()
        if not self._counts_exactly:
            self._correct_steps()
        compute_seconds = time.monotonic() - before
        filepath = self._get_file_path(epoch, batch, logs)
        best: Any = self.best  # a number of Keras, or None
        self._observer.hide()  # Keras may print
        if not self._should_save_model(epoch, batch, logs, filepath):
            self._get_ready()
            return
        self._destination.refuse_directory(filepath)
        arrays = self._live_arrays()
        place = self._place(filepath, epoch, batch, logs)
        pending = self._engine.save(
            arrays,
            self._steps.current,
            place if self._second_tier is None else self._second_tier.extend(place),
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
        if self._second_tier is not None:
            self._second_tier.count()
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
        if type(self)._get_file_path is not SavingCheckpoint._get_file_path:
            return self._destination.place_at(filepath, self._steps.current)
        return self._destination.place(self._fields(epoch, batch, logs))

    def _live_arrays(self) -> list[Any]:
        arrays, signature = self._read_state()
        if signature == self._signature:
            ordered = self._arrange(arrays)
            if self._engine.matches(ordered):
                return ordered
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
            hdf5_checksums=self._hdf5_checksums,
        )
        if any(map(spans_processes, arrays)):
            self._refuse_own_decisions()
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

    def _correct_steps(self) -> None:
        """Waits for the last step to be computed; between epochs that costs nothing worth mentioning."""
        self._steps.correct(keras_state.read_iterations(self._model, as_trained=self._as_trained))

    def _pack_extra(self, epoch: int, batch: int | None, logs: Logs | None) -> dict[str, Attachment]:
        if self._resumption is None:
            return {}
        logs = self._epoch_logs if self._event == "epoch_end" else logs
        return self._resumption.pack(Moment(self._event, epoch, batch, packable_items(logs)))

    def _begin_late(self) -> None:
        """Begins where `on_train_begin` has not come."""
        raise NotImplementedError

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
        "versions": VERSIONS,
    }
