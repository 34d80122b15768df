"""What stock's `ModelCheckpoint` decides, and where ours decides otherwise: how often, and what is better."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import keras
import numpy as np

from offstep import keras_state, policy
from offstep.frequency import Frequency, parse_budget
from offstep.manifest import Manifest, find_best
from offstep.retention import Ranking

Stock: Any = keras.callbacks.ModelCheckpoint
"""Stock's class, whatever a script puts in its place later."""


_NEAR_SECONDS = 60.0


class DecidingCheckpoint(keras.callbacks.ModelCheckpoint):  # type: ignore[misc]  # Keras carries no types
    """Stock's callback that knows more frequencies, and never takes a metric that is not finite for the best.

    Args:
        overhead_budget: Share of the time that saving may take, instead of `save_freq`.
        clock: Returns the seconds that a time in `save_freq` is measured in; it never goes back.
        arguments: Those of stock.

    Raises:
        ValueError: an argument is out of range; the message ends in what was received.
    """

    best: Any  # a number, of the backend or of NumPy too; None before the first
    _model: Any  # Keras carries no types

    def __init__(
        self,
        filepath: str,
        monitor: str,
        verbose: int,
        save_best_only: bool,
        save_weights_only: bool,
        mode: str,
        save_freq: str | int,
        initial_value_threshold: float | None,
        *,
        overhead_budget: str | float | None,
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        self._told: set[str] = set()
        self._approach = policy.Approach()
        self._is_promising = False
        self._frequency: Frequency | None = None
        if overhead_budget is not None:
            self._frequency = Frequency(parse_budget(overhead_budget), clock)
            if save_freq != "epoch":
                raise ValueError(f"give save_freq or overhead_budget, not both. Received: {save_freq=}")
            save_freq = 1
        # Keras would refuse the frequencies that it does not know; ours are checked next.
        super().__init__(
            filepath, monitor, verbose, save_best_only, save_weights_only, mode, "epoch", initial_value_threshold
        )
        self.save_freq = save_freq

    @property
    def save_freq(self) -> str | int:
        """How often to save, a number of batches as an integer; another value may be set between two batches."""
        return self._save_freq

    @save_freq.setter
    def save_freq(self, save_freq: str | int) -> None:
        frequency = policy.parse_save_freq(save_freq)
        self._schedule = policy.Schedule(frequency, self._clock)
        is_batches = frequency.unit == "batches"
        self._save_freq: str | int = int(frequency.count) if is_batches else save_freq
        self._decides_on_batches = frequency.unit != "epochs"

    def _should_save_on_batch(self, batch: int) -> bool:
        if self._frequency is not None:
            is_due = self._frequency.end_batch(is_writing=self._is_writing())
            choice = self._frequency.take_news()
            if choice is not None:
                self._print(f"\noffstep: {choice.describe(self._steps_per_execution)}")
            return is_due
        if isinstance(self.save_freq, int):
            return bool(super()._should_save_on_batch(batch))
        return self._schedule.is_due_after_batch()

    # ----------------------------------------------------------------------------------------- what is to be expected

    @property
    def _is_overridden(self) -> bool:
        """Whether a subclass decides, or names, by means of its own."""
        raise NotImplementedError

    @property
    def _decides_freely(self) -> bool:
        is_overridden = type(self)._should_save_on_batch is not DecidingCheckpoint._should_save_on_batch
        return self._frequency is not None or self._is_overridden or is_overridden

    @property
    def _decides_by_clock(self) -> bool:
        """Whether another process, with another clock, might decide otherwise."""
        return self._frequency is not None or self._schedule.left().unit == "seconds"

    def _left(self) -> policy.SaveFrequency:
        if isinstance(self.save_freq, int):
            return policy.SaveFrequency(self.save_freq - self._batches_seen_since_last_saving, "batches")
        return self._schedule.left()

    def _lasts_until_due(self) -> bool | None:
        """Returns whether the training lasts until the next save is due; `None` when its length is not known."""
        params = self.params if isinstance(self.params, dict) else {}
        epochs, batches = (count if isinstance(count := params.get(key), int) else None for key in ("epochs", "steps"))
        return policy.lasts_for(self._left(), epochs=epochs, batches=batches)

    def _may_save(self) -> bool:
        """Returns whether a save may come in this training; false only where it is known to end before."""
        return self._decides_freely or self._lasts_until_due() is not False

    def _is_save_near(self) -> bool:
        """Returns whether a save is to be expected, and soon enough to get ready for it."""
        if self._decides_freely:
            return True
        if self._is_doubtful():
            return False
        lasts = self._lasts_until_due()
        if lasts is not None:
            return lasts
        left = self._left()
        if left.unit == "batches":
            return isinstance(self.save_freq, int) and 2 * left.count <= self.save_freq
        return left.unit == "epochs" or left.count <= _NEAR_SECONDS

    def _is_doubtful(self) -> bool:
        """Returns whether the metric has to beat what the user demands, and gets no nearer to that."""
        if not self.save_best_only or self._is_promising or self.best is None:
            return False
        return bool(np.isfinite(np.asarray(self.best)).all())

    def _print(self, text: str) -> None:
        keras_state.print_message(text)

    def _is_writing(self) -> bool:
        """Returns whether a save is not durable yet."""
        raise NotImplementedError

    @property
    def _steps_per_execution(self) -> int:
        return getattr(self._model, "steps_per_execution", None) or 1

    @property
    def _counts_exactly(self) -> bool:
        # The last execution of an epoch may be a short one, and a loss that overflows is no step.
        return not (self._steps_per_execution > 1 or keras_state.skips_steps(self._model))

    def _pause(self) -> None:
        if self._frequency is not None:
            self._frequency.pause()

    def _rank(self, keep_best: int, keep_every: int | None) -> Ranking:
        direction = self._find_direction()
        if direction is None:  # nobody can say which is best
            return Ranking(keep_every=keep_every)
        return Ranking(self.monitor, direction, keep_best, keep_every)

    def _resume_best(self, manifests: Sequence[Manifest]) -> None:
        found = find_best(manifests, self.monitor, mode=self._find_direction() or "min")
        if found is not None and self._is_improvement(found.metrics[self.monitor], self.best):
            self.best = found.metrics[self.monitor]
            self._is_promising = True  # it was made by the same training

    def _find_direction(self) -> Literal["min", "max"] | None:
        if self.monitor_op is None:
            try:
                self._choose_monitor_op()
            except ValueError:  # Keras cannot tell, and says so where it has to know
                return None
        if self.monitor_op not in (keras.ops.less, keras.ops.greater):
            return None
        return "max" if self.monitor_op is keras.ops.greater else "min"

    def _choose_monitor_op(self) -> None:
        """Lets Keras choose, but look at the metrics only: reading `self.model` within `fit` copies the whole state."""
        model = self._model
        self._model = SimpleNamespace(metrics=getattr(model, "metrics", ()))
        try:
            self._set_monitor_op()
        finally:
            self._model = model

    def _is_improvement(self, monitor_value: Any, reference_value: Any) -> bool:
        if self.monitor_op is None:
            self._choose_monitor_op()
        current = self._round(monitor_value)
        if not np.isfinite(current):
            self._tell_once(f"{self.monitor} is {current}: such a value is never the best.")
            return False
        if self.monitor_op not in (keras.ops.less, keras.ops.greater):  # the user's own
            return bool(super()._is_improvement(monitor_value, reference_value))
        mode: Literal["min", "max"] = "max" if self.monitor_op is keras.ops.greater else "min"
        best = None if reference_value is None else self._round(reference_value)
        is_better = policy.is_improvement(current, best, mode=mode, min_delta=self.min_delta)
        if is_better or best is None or self._approach.note(abs(best - current)):
            self._is_promising = True
        return is_better

    @staticmethod
    def _round(value: Any) -> float:
        # Keras compares as tensors of this precision: 0.1 and its float32 are equal there.
        with np.errstate(over="ignore"):
            return float(np.asarray(value).astype(keras.config.floatx()))

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            warnings.warn(text, UserWarning, stacklevel=3)
