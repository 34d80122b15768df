"""The Keras callback: Keras events in, engine calls out."""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from offstep import commit, keras_formats, keras_state, policy
from offstep.batches import Dispatch, Logs, StepCounter
from offstep.checkpointer import check_full_every, check_max_to_keep
from offstep.engine import Engine, Target
from offstep.frequency import Frequency, parse_budget
from offstep.options import Mode, OnBusy, OnError, Options
from offstep.pending import PendingSave
from offstep.records import SaveStats
from offstep.reports import Counts

_UNSURE_FILES = 64  # more than can be on their way at once; what fails does not count as kept


class ModelCheckpoint(keras.callbacks.ModelCheckpoint):  # type: ignore[misc]  # Keras carries no types
    """Saves a Keras model while it trains, without making the training step wait for the disk.

    The arguments up to `initial_value_threshold`, the messages and the decisions are those of
    `keras.callbacks.ModelCheckpoint`. So are the files: `.weights.h5` with `save_weights_only`, else `.keras` or `.h5`.
    With any other suffix the whole state (weights, optimizer, metrics, seed generators) is saved in a directory that
    `keras.saving.load_model`, `model.load_weights` and Orbax read.

    Args:
        filepath: Template of the path, e.g. `"ckpts/{step}"`. Fields: `{epoch}` and `{batch}` (from 1), `{step}`
            (`optimizer.iterations`) and the keys of `logs`. For a directory: with the last part `{step}` the directory
            above holds all steps; any other path holds one step, which the next save to it replaces. Load either with
            `keras.saving.load_model(directory that holds the steps)`.
        monitor: Name of the metric that decides what is best.
        verbose: 0 is silent, 1 prints Keras's lines.
        save_best_only: Save only what is better than everything before.
        save_weights_only: Leave out optimizer, metrics and model configuration.
        mode: `"auto"`, `"min"` or `"max"`.
        save_freq: `"epoch"`, or a number of batches.
        initial_value_threshold: What the first best has to beat.
        max_to_keep: How many of the newest steps of a directory stay, or of the files that this run saved; `None`
            keeps all.
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

    Raises:
        ValueError: an argument is out of range; the message ends in what was received.

    Example:
        >>> callback = ModelCheckpoint("ckpts/{step}", save_freq=100, max_to_keep=3)
    """

    # Decisions and snapshots happen in hooks that Keras always calls on the training thread. Where its dispatch calls
    # `on_train_batch_end` from a pool, that hook only takes notes, so this callback need not switch the pool off.
    async_safe = True

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
    ) -> None:
        filepath = os.fspath(filepath)
        self._format = policy.format_of(filepath, weights_only=save_weights_only)
        is_directory = self._format == keras_formats.DIRECTORY
        # Keras's checks know its own files only: for a directory they see a name that suits the other arguments.
        stand_in = "model.weights.h5" if save_weights_only else "model.keras"
        self._frequency: Frequency | None = None
        if overhead_budget is not None:
            self._frequency = Frequency(parse_budget(overhead_budget))
            if save_freq != "epoch":
                raise ValueError(f"give save_freq or overhead_budget, not both. Received: {save_freq=}")
            save_freq = 1
        super().__init__(
            stand_in if is_directory else filepath,
            monitor,
            verbose,
            save_best_only,
            save_weights_only,
            mode,
            save_freq,
            initial_value_threshold,
        )
        self.filepath = filepath
        if save_freq != "epoch" and int(save_freq) < 1:
            raise ValueError(f"save_freq must be 'epoch' or at least 1 batch. Received: save_freq={save_freq!r}")
        check_max_to_keep(max_to_keep)
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
        )
        if skip_unchanged and not is_directory:
            raise ValueError(f"skip_unchanged works for directories, which share files. Received: filepath={filepath}")
        self._skip_unchanged = skip_unchanged
        self._template = policy.Template(filepath)
        root, kind = policy.split_target(self._template)
        self._root_template, self._holds_one_step = root, kind == "single"
        if not is_directory:
            self._root_template = policy.Template(os.path.dirname(filepath) or ".", filepath=filepath)
        self._max_to_keep = max_to_keep
        self._engine = Engine(options, on_durable=self._say_durable)
        self._base = self._working_directory = Path()
        self._current_epoch = 0
        self._order: tuple[int, ...] = ()  # which live array each leaf is
        self._iteration_index: int | None = None
        self._saved: deque[PendingSave] = deque(maxlen=None if max_to_keep is None else max_to_keep + _UNSURE_FILES)
        self._signature: object = None
        self._steps = StepCounter()
        self._is_in_fit = False
        self._as_trained = False
        self._dispatch = Dispatch()
        self._told: set[str] = set()

    # ------------------------------------------------------------------------------------------------- outcomes

    @property
    def stats(self) -> list[SaveStats]:
        """What each save cost, oldest first."""
        return self._engine.stats

    @property
    def counts(self) -> Counts:
        """How many saves were requested, became durable, failed, were skipped."""
        return self._engine.counts

    def wait_until_finished(self, timeout: float | None = None) -> None:
        """Waits until everything saved so far is durable.

        Raises:
            SaveFailed: a save failed.
            SaveTimeout: `timeout` seconds ran out; it names the steps that are not durable, and the newest that is.
                The saves go on.
        """
        self._engine.wait(timeout)

    # ---------------------------------------------------------------------------------------------------- hooks

    def on_train_begin(self, logs: Logs | None = None) -> None:
        """Checks the target, lays out the slots and starts the writer."""
        self._dispatch.begin_training()
        self._is_in_fit = keras_state.is_in_fit(self._model)
        self._begin()

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        """Notes the epoch."""
        super().on_epoch_begin(epoch, logs)
        self._dispatch.begin_epoch()
        if self._frequency is not None:
            self._frequency.resume()
        self._steps.begin_epoch()
        self._correct_steps()

    def on_train_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        """Does what was due after the batch before, while its state still exists."""
        self._catch_up()
        self._dispatch.begin_batch(batch + self._steps_per_execution - 1, keras_state.last_step_id(self._model))

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        """Saves if due; on a thread of Keras's pool it only notes the logs."""
        if self._dispatch.is_training_thread():
            self._dispatch.end_batch()
            self._after_batch(batch, logs)
        elif self.save_freq != "epoch":
            self._dispatch.note(batch, dict(logs or {}))

    def on_test_begin(self, logs: Logs | None = None) -> None:
        """Saves what is due after the last batch of an epoch, before validation resets the metrics."""
        if self._has_ended():
            self._catch_up()
        self._pause()

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Saves if due."""
        if self._has_ended():
            self._catch_up()
        self._dispatch.end_batch()
        self._correct_steps()
        super().on_epoch_end(epoch, logs)
        self._engine.poll()
        self._pause()

    def on_train_end(self, logs: Logs | None = None) -> None:
        """Waits until everything is durable, and frees the slots."""
        if self._has_ended():
            self._catch_up()
        self._engine.close()
        self._engine.raise_failures()

    def _pause(self) -> None:
        if self._frequency is not None:
            self._frequency.pause()

    def _has_ended(self) -> bool:
        return self._dispatch.has_ended(keras_state.last_step_id(self._model))

    def _begin(self) -> None:
        # From here on relative paths stay where they are, whatever becomes of the working directory.
        self._base = _constant_parent(self._root_template)
        self._working_directory = Path.cwd()
        commit.probe_directory(self._base)
        if not self._template.fields:
            self._refuse_directory(self._template.format({}))
        self._open()

    def _catch_up(self) -> None:
        batch = self._dispatch.end_batch()
        if batch is None:
            return
        # In `fit`, hooks of other callbacks may have changed the model since the batch ended; a loop driven by hand
        # may change it before it says that the batch has ended.
        self._as_trained = self._is_in_fit
        try:
            self._after_batch(batch, None)
        finally:
            self._as_trained = False

    def _after_batch(self, batch: int, logs: Logs | None) -> None:
        self._engine.poll()
        self._steps.count(batch)
        if not self._should_save_on_batch(batch):
            return
        if logs is None and self._needs_logs:
            self._correct_steps()
            logs = self._dispatch.wait_for_logs(batch)
        self._save_model(epoch=self._current_epoch, batch=batch, logs=logs)

    # ------------------------------------------------------------------------------------------------- deciding

    def _should_save_on_batch(self, batch: int) -> bool:
        if self._frequency is None:
            return bool(super()._should_save_on_batch(batch))
        is_due = self._frequency.end_batch(is_writing=self._engine.is_writing)
        choice = self._frequency.take_news()
        if choice is not None:
            keras_state.print_message(f"\noffstep: {choice.describe(self._steps_per_execution)}")
        return is_due

    @property
    def _needs_logs(self) -> bool:
        return bool(self.save_best_only or self._template.fields - {"epoch", "batch", "step"})

    @property
    def _steps_per_execution(self) -> int:
        return getattr(self._model, "steps_per_execution", None) or 1

    @property
    def _counts_exactly(self) -> bool:
        # The last execution of an epoch may be a short one, and a loss that overflows is no step.
        return self._steps_per_execution == 1 and not keras_state.skips_steps(self._model)

    def _is_improvement(self, monitor_value: Any, reference_value: Any) -> bool:
        if self.monitor_op is None:
            self._set_monitor_op()
        mode: Literal["min", "max"] = "max" if self.monitor_op is keras.ops.greater else "min"
        current = self._round(monitor_value)
        if not np.isfinite(current):
            self._tell_once(f"{self.monitor} is {current}: such a value is never the best.")
        best = None if reference_value is None else self._round(reference_value)
        return policy.is_improvement(current, best, mode=mode, min_delta=self.min_delta)

    @staticmethod
    def _round(value: Any) -> float:
        # Keras compares as tensors of this precision: 0.1 and its float32 are equal there.
        with np.errstate(over="ignore"):
            return float(np.asarray(value).astype(keras.config.floatx()))

    def _get_file_path(self, epoch: int, batch: int | None, logs: Logs | None) -> str:
        return self._template.format(self._fields(epoch, batch, logs))

    def _fields(self, epoch: int, batch: int | None, logs: Logs | None) -> dict[str, Any]:
        counted = {} if batch is None else {"batch": batch + 1}
        return counted | dict(logs or {}) | {"epoch": epoch + 1, "step": self._steps.current}

    # --------------------------------------------------------------------------------------------------- saving

    def _save_model(self, epoch: int, batch: int | None, logs: Logs | None) -> None:
        started = time.monotonic()
        self._engine.poll()
        if self._signature is None:
            self._begin()
        before = time.monotonic()
        if not self._counts_exactly:
            self._correct_steps()
        compute_seconds = time.monotonic() - before
        filepath = self._get_file_path(epoch, batch, logs)
        if not self._should_save_model(epoch, batch, logs, filepath):
            return
        self._refuse_directory(filepath)
        arrays = self._live_arrays()
        manifest = {
            "epoch": epoch + 1,
            "batch": None if batch is None else batch + 1,
            "metrics": _plain_numbers(logs or {}),
            "versions": {"keras": keras.__version__, "jax": version("jax")},
        }
        fields = self._fields(epoch, batch, logs)
        siblings = self._list_siblings()
        pending = self._engine.save(
            arrays,
            self._steps.current,
            lambda step: self._target(fields | {"step": step}, siblings),
            step_leaf=self._iteration_index,
            step_divisor=self._steps.divisor,
            manifest=manifest,
            note=f"\nEpoch {epoch + 1}: finished saving model to {filepath}",
            started=started,
            compute_seconds=compute_seconds,
        )
        if pending is None:
            return
        if self._max_to_keep is not None and self._is_file:
            self._saved.append(pending)
        if self._frequency is not None:
            self._frequency.note_call(pending.stats.call_seconds, pending.stats.compute_seconds)

    @property
    def _is_file(self) -> bool:
        return self._format != keras_formats.DIRECTORY

    def _target(self, fields: Mapping[str, Any], siblings: Sequence[Path]) -> Target:
        root = self._working_directory / self._root_template.format(fields)
        shown = self._template.format(fields)
        if not self._is_file:
            return Target(self._base, root, shown, self._max_to_keep, self._holds_one_step)
        file = self._working_directory / shown
        others = tuple(str(path) for path in siblings if path != file)
        return Target(self._base, root, shown, self._max_to_keep, file=file, siblings=others)

    def _list_siblings(self) -> list[Path]:
        """Returns the files saved so far, each once, in the order of their newest contents."""
        newest_first = dict.fromkeys(self._working_directory / pending.path for pending in reversed(self._saved))
        return list(newest_first)[::-1]

    def _refuse_directory(self, filepath: str) -> None:
        if self._is_file and (self._working_directory / filepath).is_dir():
            raise OSError(  # in the words of Keras
                "Please specify a non-directory filepath for ModelCheckpoint. "
                f"Filepath used is an existing directory: {filepath}"
            )

    def _live_arrays(self) -> list[Any]:
        arrays, signature = self._read_state()
        if signature != self._signature or not self._engine.matches(self._arrange(arrays)):
            self._open()
        return self._arrange(arrays)

    def _arrange(self, arrays: list[Any]) -> list[Any]:
        return [arrays[number] for number in self._order]

    def _read_state(self) -> tuple[list[Any], object]:
        weights_only = self.save_weights_only and not self._is_file  # the files of Keras have the optimizer too
        return keras_state.live_state(self._model, weights_only=weights_only, as_trained=self._as_trained)

    def _open(self) -> None:
        arrays, self._signature = self._read_state()
        form = keras_formats.describe_form(
            self._model,
            arrays,
            self._format,
            weights_only=self.save_weights_only,
            skip_unchanged=self._skip_unchanged,
        )
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
        )
        self._steps.divisor = keras_state.batches_per_iteration(self._model)
        self._correct_steps()

    def _correct_steps(self) -> None:
        """Waits for the last step to be computed; between epochs that costs nothing worth mentioning."""
        self._steps.correct(keras_state.read_iterations(self._model, as_trained=self._as_trained))

    # -------------------------------------------------------------------------------------------------- talking

    def _say_durable(self, pending: PendingSave) -> None:
        if self._frequency is not None and pending.stats.durable_seconds is not None:
            self._frequency.note_durable(pending.stats.durable_seconds)
        if self.verbose > 0:
            keras_state.print_message(pending.note)

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            warnings.warn(text, UserWarning, stacklevel=3)


def _constant_parent(template: policy.Template) -> Path:
    """Returns the part of a path before the first one with a field in it."""
    parts: list[str] = []
    for part in Path(template.text).absolute().parts:
        if "{" in part:
            return Path(*parts)
        parts.append(part)
    return Path(*parts)


def _plain_numbers(logs: Logs) -> dict[str, float]:
    """Returns the entries of the logs that are numbers, as JSON can hold them; other callbacks put anything there."""
    arrays = {name: np.asarray(value) for name, value in logs.items()}
    return {name: float(array) for name, array in arrays.items() if array.ndim == 0 and array.dtype.kind in "biuf"}
