"""Carries a `fit` over a kill: packs with each save what the arrays do not hold, and goes on from there exactly.

A save is a moment within one of our hooks. When the training is started again, Keras is led back to the same hook of
the same batch, and there everything is put back: so the callbacks behind ours in the list hear next what they would
have heard next.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import keras

from offstep import attachments, catalog, keras_random, keras_state, memory_tier, policy
from offstep.attachments import Attachment, Value
from offstep.discovery import list_newest_of, place_tiers
from offstep.errors import CheckpointNotFound, StructureMismatch
from offstep.formats.slot_reader import SlotReader
from offstep.keras_callback_state import CallbackStates
from offstep.keras_data import DataPosition, Skip
from offstep.keras_fit import NO_EPOCH_LEFT, AfterAll, RunningFit, find_fit, set_initial_epoch
from offstep.keras_rebuild import GROUPS, list_variables
from offstep.restoration import restore, restore_from
from offstep.stores.address import is_address, split_query
from offstep.stores.path import Readable, open_place

Model = Any  # Keras carries no types
Event = Literal["train_batch_begin", "train_batch_end", "test_begin", "epoch_end"]
Logs = Mapping[str, Any]

EXTRA_NAME = "offstep-extra"
"""The file of a checkpoint with what is kept beside the arrays; those of large fields have this and their own name."""

_VERSION = 1


@dataclass(frozen=True)
class Moment:
    """When a save was made.

    Attributes:
        event: The hook.
        epoch: Of the hook, from 0.
        batch: Last batch of the epoch that was trained, from 0; `None` after the end of the epoch.
        logs: What the hook was told, as far as it can be kept; `None` when it was told nothing.
    """

    event: Event
    epoch: int
    batch: int | None
    logs: dict[str, Value] | None


@dataclass(frozen=True)
class _Found:
    """A checkpoint that was read."""

    path: Readable
    values: list[jax.Array]  # of the model's variables; deleted if other callbacks train or evaluate before us
    extra: dict[str, Value]
    large: dict[str, Value]

    @property
    def moment(self) -> Moment:
        return Moment(**self.extra["moment"])


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
        self._found: _Found | None = None  # what is still to be put back
        self._skip: Skip | None = None  # what the next epoch skips of a pass over the data that spans epochs
        self._start: Value = None  # of the current pass
        self._drawn_before = 0
        self.is_standing_in = False
        """Whether the batch that Keras believes to train is one that was trained before the interruption."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy resumes a training of its own."""
        nothing: dict[str, Any] = dict.fromkeys(("_model", "_fit", "_states", "_found", "_skip", "_start"))
        return self.__dict__ | nothing | {"_drawn_before": 0, "is_standing_in": False}

    # -------------------------------------------------------------------------------------------------- reading

    def begin(self, model: Model, filepath: str, upload: str | None = None) -> None:
        """Reads the newest checkpoint that can be read, in `on_train_begin`.

        Args:
            model: The model, built.
            filepath: Template of the checkpoints' paths.
            upload: Address of the steps in a store into which some of them were copied.

        Raises:
            ValueError: another callback of the `fit` resumes it already.
            StructureMismatch: the checkpoint is one of another model.
            CheckpointNotFound: there are checkpoints, but none can be read.
        """
        self._model, self._states, self._skip, self.is_standing_in = model, None, None, False
        self._found, self._fit = None, find_fit(model)
        if self._fit is not None and any(isinstance(each, AfterAll) for each in self._fit.callbacks):
            self._fit = None
            raise ValueError(
                "only one callback of a fit can resume it: one BackupAndRestore, or one ModelCheckpoint with "
                f"resume=True. Received: a second one, {type(self.owner).__name__}"
            )
        checkpoints = find_checkpoints(filepath)
        if upload is not None:
            root, _ = policy.split_target(policy.Template(filepath))
            checkpoints = list_newest_of(place_tiers(upload, root.format({})))
        self._found = self._read_inherited(filepath, checkpoints) or self._read_newest(checkpoints)
        if self._fit is not None:
            AfterAll(self._fit.callbacks, self._begin_after_all)
        elif self._found is not None:
            self._put_back_model(self._found)
            self._tell("Only the model was restored: this is not Keras's fit, or one that offstep does not know.")
            self._found = None

    def _read_inherited(self, filepath: str, checkpoints: Sequence[Readable]) -> _Found | None:
        """Reads the snapshot that the writer of a dead run still has in memory, if it is the newest."""
        if is_address(filepath):
            return None
        root, _ = policy.split_target(policy.Template(filepath))
        if root.fields:
            return None
        try:
            inheritance = memory_tier.inherit(Path(root.format({})))
            if inheritance is None:
                return None
            with closing(inheritance):
                is_newest = not checkpoints or int(checkpoints[0].name) <= inheritance.job.step
                if not (inheritance.is_wanted and is_newest):
                    return None
                found = _read_snapshot(inheritance, self._model)
        except (OSError, ValueError) as error:
            self._tell(f"The snapshot in the memory of the run before cannot be used, the disk is read: {error}")
            return None
        if getattr(self.owner, "verbose", 0):
            text = f"offstep: step {inheritance.job.step} was restored from the memory of writer {inheritance.writer}"
            keras_state.print_message(text)
        return found

    def _read_newest(self, checkpoints: Sequence[Readable]) -> _Found | None:
        for path in checkpoints:
            try:
                return _read(path, self._model)
            except StructureMismatch:
                raise
            except (OSError, ValueError) as error:
                self._tell(f"{path} cannot be resumed from, an older checkpoint is tried: {error}")
        if checkpoints:
            raise CheckpointNotFound(
                f"no checkpoint of {checkpoints[0].parent} can be resumed from; delete the directory to start anew"
            )
        return None

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

    def _go_on_after_epoch(self, found: _Found, moment: Moment) -> None:
        assert self._fit is not None
        self._put_back(found)
        for callback in self._fit.callbacks[self._fit.callbacks.index(self.owner) + 1 :]:
            if not isinstance(callback, keras.callbacks.ProgbarLogger):
                self._end_epoch(callback, moment)
        has_ended = self._model.stop_training
        set_initial_epoch(self._model, NO_EPOCH_LEFT if has_ended else moment.epoch + 1)
        data = found.extra["data"]
        if data is not None and data["drawn_before"]:
            self._skip = Skip(data["start"], data["drawn_before"], None, data["source"])

    def _end_epoch(self, callback: Any, moment: Moment) -> None:
        try:
            callback.on_epoch_end(moment.epoch, moment.logs)
        except Exception as error:  # noqa: BLE001  it has not begun the epoch in this process; others must go on
            self._tell(
                f"{type(callback).__name__} could not end epoch {moment.epoch + 1} again, which may change what it "
                f"does next: {type(error).__name__}: {error}. List it before the callback that saves."
            )

    def _find_obstacle(self, found: _Found) -> str | None:
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
    def _make_skip(found: _Found, data: DataPosition) -> Skip:
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

    def _put_back(self, found: _Found) -> None:
        self._found, self.is_standing_in = None, False
        self._put_back_model(found)
        extra = found.extra
        if self._states is not None and extra["callbacks"] is not None:
            for sentence in self._states.write(extra["callbacks"], found.large):
                self._tell(f"Not all callbacks were restored: {sentence}.")
        if self._data is not None and extra["data"] is not None:
            self._data.write_dataset(extra["data"]["dataset"])
        self._model.stop_training = extra["stop_training"]
        keras_random.write_random_states(extra["random"])

    def _put_back_model(self, found: _Found) -> None:
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
            "version": _VERSION,
            "moment": asdict(moment),
            "callbacks": states,
            "large": list(large),
            "data": self._describe_data(moment),
            "stop_training": bool(getattr(self._model, "stop_training", False)),
            "random": keras_random.read_random_states(),
        }
        named = {_large_name(key): attachment for key, attachment in large.items()}
        return {EXTRA_NAME: attachments.pack(extra)} | named

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


def find_checkpoints(filepath: str) -> Sequence[Readable]:
    """Returns the committed checkpoints that saves to a template have made, the newest first."""
    plain, options = split_query(filepath)
    root, _ = policy.split_target(policy.Template(plain, filepath=filepath))
    if is_address(filepath):
        place = open_place(f"{root.text}{options}")
        return [place / str(step) for step in reversed(catalog.list_steps(place))]
    pattern = Path(root.pattern).absolute()
    roots = [Path(path) for path in glob.glob(str(pattern))]
    found = [path / str(step) for path in roots for step in catalog.list_steps(path)]
    return sorted(found, key=lambda path: (int(path.name), path.stat().st_mtime_ns), reverse=True)


def _read(path: Readable, model: Model) -> _Found:
    extra, large = _unpack(lambda name: attachments.read(path / name))
    restore(model, path)
    return _Found(path, keras_state.live_arrays(model), extra, large)


def _read_snapshot(snapshot: memory_tier.Inheritance, model: Model) -> _Found:
    path = Path(snapshot.job.target)
    extra, large = _unpack(lambda name: attachments.read(snapshot.attached_file(name)))
    with closing(SlotReader(path, snapshot.plan, snapshot.slot, snapshot.job.manifest)) as reader:
        restore_from(model, reader)
    return _Found(path, keras_state.live_arrays(model), extra, large)


def _unpack(read: Callable[[str], Value]) -> tuple[dict[str, Value], dict[str, Value]]:
    extra: dict[str, Value] = read(EXTRA_NAME)
    if extra["version"] > _VERSION:
        raise ValueError(f"it was written by a newer offstep (version {extra['version']} of its extra file)")
    return extra, {key: read(_large_name(key)) for key in extra["large"]}


def _large_name(key: str) -> str:
    return f"{EXTRA_NAME}.{key}"
