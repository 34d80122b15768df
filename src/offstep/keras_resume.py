"""Carries a `fit` over a kill: packs with each save what the arrays do not hold, and goes on from there exactly.

A save is a moment within one of our hooks. When the training is started again, Keras is led back to the same hook of
the same batch, and there everything is put back: so the callbacks behind ours in the list hear next what they would
have heard next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import keras

from offstep import attachments, keras_random, keras_state
from offstep.attachments import Attachment, Value
from offstep.coordination import ProcessMissing, ServiceLost
from offstep.keras_callback_state import CallbackStates
from offstep.keras_data import DataPosition, Skip
from offstep.keras_fit import NO_EPOCH_LEFT, AfterAll, RunningFit, find_fit, set_initial_epoch
from offstep.keras_rebuild import GROUPS, list_variables
from offstep.keras_saved_fit import (
    VERSION,
    Moment,
    SavedFit,
    Trainers,
    find_saved_fit,
    find_trainers,
    large_name,
)
from offstep.restoration import restore

Model = Any  # Keras carries no types


class Resumption:
    """Packs the state of a `fit` beside its arrays, and puts it back when the `fit` is started again.

    The training thread calls it, from the hooks of the same names.

    Args:
        owner: The callback whose hooks these are.
        tell: Tells the user something once.
        mid_epoch: Whether an interrupted epoch goes on where it was; otherwise it begins again.
    """

    def __init__(self, owner: Any, tell: Callable[[str], None], *, mid_epoch: bool = True) -> None:
        self.owner = owner
        self._tell, self._mid_epoch = tell, mid_epoch
        self._model: Model = None
        self._fit: RunningFit | None = None
        self._states: CallbackStates | None = None
        self._found: SavedFit | None = None  # what is still to be put back
        self._skip: Skip | None = None  # what the next epoch skips of a pass over the data that spans epochs
        self._trainers = Trainers(None, have_own_disks=False)
        self._start: Value = None  # of the current pass
        self._drawn_before = 0
        self.is_standing_in = False
        """Whether the batch that Keras believes to train is one that was trained before the interruption."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy resumes a training of its own."""
        nothing: dict[str, Any] = dict.fromkeys(("_model", "_fit", "_states", "_found", "_skip", "_start"))
        alone = Trainers(None, have_own_disks=False)
        return self.__dict__ | nothing | {"_drawn_before": 0, "is_standing_in": False, "_trainers": alone}

    # -------------------------------------------------------------------------------------------------- reading

    def begin(self, model: Model, filepath: str, upload: str | None = None, *, have_own_disks: bool = False) -> None:
        """Reads the newest checkpoint that can be read, in `on_train_begin`.

        Where several processes train, it waits for all of them, and reads the newest that all of them can read.

        Args:
            model: The model, built.
            filepath: Template of the checkpoints' paths.
            upload: Address of the steps in a store into which some of them were copied.
            have_own_disks: Whether each of several processes saves to a disk of its own.

        Raises:
            ValueError: another callback of the `fit` resumes it already.
            StructureMismatch: the checkpoint is one of another model.
            CheckpointNotFound: there are checkpoints, but none can be read.
            ProcessMissing, ServiceLost: not all processes have come here.
        """
        self._model, self._states, self._skip, self.is_standing_in = model, None, None, False
        self._found, self._fit = None, find_fit(model)
        if self._fit is not None and any(isinstance(each, AfterAll) for each in self._fit.callbacks):
            self._fit = None
            raise ValueError(
                "only one callback of a fit can resume it: one BackupAndRestore, or one ModelCheckpoint with "
                f"resume=True. Received: a second one, {type(self.owner).__name__}"
            )
        self._trainers = find_trainers(model, have_own_disks=have_own_disks)
        self._found = find_saved_fit(model, filepath, upload, self._trainers, tell=self._tell, say=self._say)
        if self._fit is not None:
            AfterAll(self._fit.callbacks, self._begin_after_all)
        elif self._found is not None:
            self._put_back_model(self._found)
            self._tell("Only the model was restored: this is not Keras's fit, or one that offstep does not know.")
            self._found = None

    def _say(self, text: str) -> None:
        if getattr(self.owner, "verbose", 0):
            keras_state.print_message(text)

    # ----------------------------------------------------------------------------------------------- going on

    def _begin_after_all(self) -> None:
        assert self._fit is not None
        self._states = CallbackStates(self._fit.callbacks)
        if self._found is None:
            return
        moment = self._found.moment
        if moment.event == "epoch_end":
            self._go_on_after_epoch(self._found, moment)
            return
        set_initial_epoch(self._model, moment.epoch)
        obstacle = self._find_obstacle(self._found)
        if obstacle is not None or not self._mid_epoch:
            if obstacle is not None:
                self._tell(f"Epoch {moment.epoch + 1} begins again, with what it had learned: {obstacle}.")
            self._put_back(self._found)

    def _go_on_after_epoch(self, found: SavedFit, moment: Moment) -> None:
        assert self._fit is not None
        self._put_back(found)
        for callback in self._fit.callbacks[self._fit.callbacks.index(self.owner) + 1 :]:
            if not isinstance(callback, keras.callbacks.ProgbarLogger):
                self._end_epoch(callback, moment)
        has_ended = self._model.stop_training
        set_initial_epoch(self._model, NO_EPOCH_LEFT if has_ended else moment.epoch + 1)
        data, change = found.extra["data"], self._find_change(found)
        if change is not None:
            self._tell(f"Epoch {moment.epoch + 2} draws other data than it would have: {change}.")
        elif data is not None and data["drawn_before"]:
            self._skip = Skip(data["start"], data["drawn_before"], None, data["source"])

    def _end_epoch(self, callback: Any, moment: Moment) -> None:
        try:
            callback.on_epoch_end(moment.epoch, moment.logs)
        except Exception as error:  # noqa: BLE001  it has not begun the epoch in this process; others must go on
            self._tell(
                f"{type(callback).__name__} could not end epoch {moment.epoch + 1} again, which may change what it "
                f"does next: {type(error).__name__}: {error}. List it before the callback that saves."
            )

    def _find_change(self, found: SavedFit) -> str | None:
        """Says so if the data are shared out over another number of processes than they were."""
        if found.processes == self._trainers.count:
            return None
        return f"the number of processes was {found.processes}, now it is {self._trainers.count}"

    def _find_obstacle(self, found: SavedFit) -> str | None:
        change = self._find_change(found)
        if change is not None:
            return change
        data, saved = self._data, found.extra["data"]
        if data is None or saved is None:
            return "this Keras does not show where in its data it is"
        now = {"steps_per_execution": self._model.steps_per_execution, "kind": data.kind}
        if data.batch_count is not None and saved["batch_count"] is not None:
            now["batch_count"] = data.batch_count
        for name, value in now.items():
            if saved[name] != value:
                return f"{name} was {saved[name]!r}, now it is {value!r}"
        doubt = data.find_doubt()
        if doubt is not None:
            self._tell(f"The position in the data is not known for sure to be exact: {doubt}.")
        return None

    @property
    def _data(self) -> DataPosition | None:
        return None if self._fit is None else self._fit.data

    def begin_epoch(self, epoch: int) -> None:
        """Leads Keras to the batch at which to go on, or notes where the data begin; in `on_epoch_begin`."""
        if self._fit is None:
            return
        if self._states is None:
            self._begin_after_all()  # Keras has copied its list
        set_initial_epoch(self._model, None)  # the next `fit` starts where it is told
        if self._found is not None and epoch != self._found.moment.epoch:
            self._tell(f"fit starts with epoch {epoch + 1}, the checkpoint is of epoch {self._found.moment.epoch + 1}.")
            self._put_back(self._found)
        data = self._data
        if data is None:
            return
        if self._found is not None:
            self._skip = self._make_skip(self._found, data)
        if self._skip is None:
            self._drawn_before = data.drawn_before
            if self._drawn_before == 0:
                self._start = data.read_start()
        else:
            self._start, self._drawn_before = self._skip.start, self._skip.drawn_before
            data.begin_with(self._skip)
            self._skip = None

    @staticmethod
    def _make_skip(found: SavedFit, data: DataPosition) -> Skip:
        saved = found.extra["data"]
        if saved["drawn_before"] == 0:  # the pass begins with this epoch
            keras_random.write_random_states(saved["start"]["random"])
            data.write_dataset(saved["start"]["dataset"])
        return Skip(saved["start"], saved["drawn_before"], found.moment.batch, saved["source"])

    def begin_batch(self) -> bool:
        """Returns whether the batch that begins is one that was trained before; in `on_train_batch_begin`."""
        if self._found is None:
            return False
        if self.is_standing_in:
            self.settle()
            return False
        self.is_standing_in = True
        self._put_back_model(self._found)
        assert self._data is not None
        logs = self._found.moment.logs
        self._data.logs = dict(self._model.get_metrics_result() if logs is None else logs)
        return True

    def settle(self) -> None:
        """Puts back what is still to be put back: the moment of the save has come again."""
        if self._found is not None and self.is_standing_in:
            self._put_back(self._found)

    def end(self) -> None:
        """Lets go of the `fit`; in `on_train_end`."""
        if self._data is not None:
            self._data.release()
        if self._fit is not None:  # without an epoch, nothing has taken it back
            set_initial_epoch(self._model, None)
        self._fit = self._states = None

    def have_all_ended(self) -> bool:
        """Waits until all processes have come to the end of this training; says so if they have not."""
        try:
            self._trainers.meet()
        except (ProcessMissing, ServiceLost) as error:
            self._tell(f"It is not known whether all processes have finished the training: {error}")
            return False
        return True

    def _put_back(self, found: SavedFit) -> None:
        self._found, self.is_standing_in = None, False
        self._put_back_model(found)
        extra = found.extra
        if self._states is not None and extra["callbacks"] is not None:
            for sentence in self._states.write(extra["callbacks"], found.large):
                self._tell(f"Not all callbacks were restored: {sentence}.")
        if self._data is not None and extra["data"] is not None:
            self._data.write_dataset(extra["data"]["dataset"])
        self._model.stop_training = extra["stop_training"]
        if self._find_change(found) is None:  # else some would draw the same numbers as others
            keras_random.write_random_states(extra["random"])

    def _put_back_model(self, found: SavedFit) -> None:
        model = self._model
        keras_state.attach_values(model)
        if any(value.is_deleted() for value in found.values):
            restore(model, found.path)
            return
        variables = [variable for group in GROUPS for variable in list_variables(model, group)]
        for variable, value in zip(variables, found.values, strict=True):
            variable.assign(value)

    # -------------------------------------------------------------------------------------------------- packing

    def pack(self, moment: Moment) -> dict[str, Attachment]:
        """Returns what a checkpoint made now has to carry, by the names of the files."""
        states, large = (None, {}) if self._states is None else self._states.read()
        extra = {
            "version": VERSION,
            "moment": asdict(moment),
            "processes": self._trainers.count,
            "callbacks": states,
            "large": list(large),
            "data": self._describe_data(moment),
            "stop_training": bool(getattr(self._model, "stop_training", False)),
            "random": keras_random.read_random_states(),
        }
        name = self._trainers.extra_name
        named = {large_name(name, key): attachment for key, attachment in large.items()}
        return {name: attachments.pack(extra)} | named

    def _describe_data(self, moment: Moment) -> Value:
        data = self._data
        if data is None:
            return None
        return {
            "kind": data.kind,
            "steps_per_execution": self._model.steps_per_execution,
            "batch_count": data.batch_count,
            "start": self._start,
            "drawn_before": data.drawn_before if moment.event == "epoch_end" else self._drawn_before,
            "source": data.read_source(),
            "dataset": data.read_dataset(),
        }
