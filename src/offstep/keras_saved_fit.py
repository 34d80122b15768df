"""A `fit` as a checkpoint holds it: found and read, by one process or by several together."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax

from offstep import attachments, catalog, keras_state, manifest, memory_tier, policy
from offstep.attachments import Value
from offstep.coordination import PRIMARY, Group, find_group
from offstep.discovery import list_newest_of, place_tiers
from offstep.errors import CheckpointNotFound, StructureMismatch
from offstep.formats.slot_reader import SlotReader
from offstep.holders import spans_processes
from offstep.joint_discovery import agree_on_choices, name_saves
from offstep.manifest import Manifest
from offstep.restoration import restore, restore_from
from offstep.stores.address import is_address, split_query
from offstep.stores.path import Readable, StorePath, open_place

Model = Any  # Keras carries no types
Event = Literal["train_batch_begin", "train_batch_end", "test_begin", "epoch_end"]
Tell = Callable[[str], None]

EXTRA_NAME = "offstep-extra"
"""The file of a checkpoint with what is kept beside the arrays; those of large fields have this and their own name."""

VERSION = 1

_meetings = itertools.count(1)  # the processes begin and end the same trainings, in the same order


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
class SavedFit:
    """A checkpoint that was read.

    Attributes:
        path: Where it is.
        values: Of the model's variables; deleted if other callbacks train or evaluate before they are put back.
        extra: What lay beside the arrays.
        large: Large fields of callbacks, by their keys.
    """

    path: Readable
    values: list[jax.Array]
    extra: dict[str, Value]
    large: dict[str, Value]

    @property
    def moment(self) -> Moment:
        """When it was saved."""
        return Moment(**self.extra["moment"])

    @property
    def processes(self) -> int:
        """How many processes trained."""
        return int(self.extra.get("processes", 1))


@dataclass(frozen=True)
class Trainers:
    """The processes that train a model.

    Attributes:
        group: Those of a state that spans several; `None` where this one is alone.
        have_own_disks: Whether each saves to a disk of its own.
    """

    group: Group | None
    have_own_disks: bool

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 if self.group is None else self.group.count

    @property
    def extra_name(self) -> str:
        """The file with what this process has to know again: each draws data, and random numbers, of its own."""
        is_plain = self.group is None or self.group.index == PRIMARY or self.have_own_disks
        return EXTRA_NAME if is_plain or self.group is None else f"{EXTRA_NAME}.process_{self.group.index}"

    def find_extra_name(self, checkpoint: Readable) -> str:
        """Returns the name of that file in a checkpoint: a copy in a store has those of all processes."""
        is_copy = self.have_own_disks and isinstance(checkpoint, StorePath)
        return replace(self, have_own_disks=False).extra_name if is_copy else self.extra_name

    def meet(self) -> None:
        """Waits until all have come here.

        Raises:
            ProcessMissing, ServiceLost: see `Group.agree`.
        """
        if self.group is not None:
            self.group.agree(_next_key(), None, lambda said: None)


def find_trainers(model: Model, *, have_own_disks: bool) -> Trainers:
    """Returns the processes that train a model, which has values."""
    is_spread = any(map(spans_processes, keras_state.live_arrays(model)))
    return Trainers(find_group() if is_spread else None, have_own_disks)


def large_name(extra_name: str, key: str) -> str:
    """Returns the name of the file with a large field."""
    return f"{extra_name}.{key}"


# ------------------------------------------------------------------------------------------------------------- finding


def find_checkpoints(filepath: str, upload: str | None = None) -> Sequence[Readable]:
    """Returns the committed checkpoints that saves to a template have made, the newest first.

    Args:
        filepath: The template.
        upload: Address of the steps in a store into which some of them were copied.
    """
    plain, options = split_query(filepath)
    root, _ = policy.split_target(policy.Template(plain, filepath=filepath))
    if upload is not None:
        return list_newest_of(place_tiers(upload, root.format({})))
    if is_address(filepath):
        place = open_place(f"{root.text}{options}")
        return [place / str(step) for step in reversed(catalog.list_steps(place))]
    pattern = Path(root.pattern).absolute()
    roots = [Path(path) for path in glob.glob(str(pattern))]
    found = [path / str(step) for path in roots for step in catalog.list_steps(path)]
    return sorted(found, key=lambda path: (int(path.name), path.stat().st_mtime_ns), reverse=True)


def find_saved_fit(
    model: Model, filepath: str, upload: str | None, trainers: Trainers, *, tell: Tell, say: Tell
) -> SavedFit | None:
    """Reads the newest checkpoint that can be read; of several processes, that all of them can read.

    Args:
        model: The model, built; it has the values then.
        filepath: Template of the checkpoints' paths.
        upload: See `find_checkpoints`.
        trainers: Who trains. Each waits for the others.
        tell: Warns the user of something.
        say: Tells the user what is as it should be.

    Raises:
        StructureMismatch: the checkpoint is one of another model.
        CheckpointNotFound: there are checkpoints, but none can be read.
        OSError: it is not known which checkpoints there are.
        ProcessMissing, ServiceLost: see `Group.agree`.
    """
    if trainers.group is None:
        checkpoints = find_checkpoints(filepath, upload)
        return _read_inherited(filepath, checkpoints, model, tell, say) or _read_newest(checkpoints, model, tell)
    group, key = trainers.group, _next_key()
    if trainers.have_own_disks:
        agreed = _agree_on_own(group, key, filepath, upload, tell)
    else:
        agreed = _agree_on_shared(group, key, filepath, upload)
    return _read_together(group, key, trainers, agreed, model, tell)


def _read_newest(checkpoints: Sequence[Readable], model: Model, tell: Tell) -> SavedFit | None:
    for path in checkpoints:
        try:
            return read_saved_fit(path, model)
        except StructureMismatch:
            raise
        except (OSError, ValueError) as error:
            tell(f"{path} cannot be resumed from, an older checkpoint is tried: {error}")
    _refuse_all(checkpoints)
    return None


def _read_inherited(
    filepath: str, checkpoints: Sequence[Readable], model: Model, tell: Tell, say: Tell
) -> SavedFit | None:
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
            found = read_snapshot(inheritance, model)
    except (OSError, ValueError) as error:
        tell(f"The snapshot in the memory of the run before cannot be used, the disk is read: {error}")
        return None
    say(f"offstep: step {inheritance.job.step} was restored from the memory of writer {inheritance.writer}")
    return found


def _refuse_all(checkpoints: Sequence[Readable]) -> None:
    if checkpoints:
        raise CheckpointNotFound(
            f"no checkpoint of {checkpoints[0].parent} can be resumed from; delete the directory to start anew"
        )


# ------------------------------------------------------------------------------------------- several processes together


def _agree_on_shared(group: Group, key: str, filepath: str, upload: str | None) -> list[Readable]:
    """Returns what the primary finds: it has the lock, so that nothing becomes durable meanwhile."""
    said = _look(filepath, upload) if group.index == PRIMARY else {}
    agreed = group.agree(key, said, lambda said: said[PRIMARY])
    if agreed["failure"]:
        raise OSError(f"it is not known what can be resumed from: process {PRIMARY}: {agreed['failure']}")
    return [open_place(name) for name in agreed["names"]]


def _look(filepath: str, upload: str | None) -> dict[str, Any]:
    """Returns what there is, or what the others are to be told of why that is not known."""
    try:
        return {"names": [str(path) for path in find_checkpoints(filepath, upload)], "failure": None}
    except OSError as error:
        return {"names": [], "failure": str(error)}


def _agree_on_own(group: Group, key: str, filepath: str, upload: str | None, tell: Tell) -> list[Readable]:
    """Returns the steps that all have on disks of their own, and those that were copied from there into a store."""
    own, written = _find_own(filepath, tell)
    store = None if upload is None else open_place(upload)
    choices = agree_on_choices(group, key, name_saves(written, None if store is None else group.count), store)
    if own and not choices:
        root = own[max(own)].parent
        tell(f"{root} has checkpoints, but none that all {group.count} processes have: training begins anew")
    if own and choices and not choices[0].is_own and max(own) > choices[0].step:
        newest = f"step {choices[0].step} of the store is the newest"
        tell(f"{own[max(own)]} is passed over, not all processes have it: {newest} that they can go on from")
    return [own[step] if is_own or store is None else store / str(step) for is_own, step in choices]


def _find_own(filepath: str, tell: Tell) -> tuple[dict[int, Readable], dict[int, Manifest]]:
    try:
        own = {int(path.name): path for path in reversed(find_checkpoints(filepath))}
        return own, {step: found for step, path in own.items() if (found := manifest.read(path)) is not None}
    except (OSError, ValueError) as error:  # then it is as if this process had none; the others wait to hear that
        tell(f"The disk of this process cannot be read: {error}")
        return {}, {}


def _read_together(
    group: Group, key: str, trainers: Trainers, checkpoints: Sequence[Readable], model: Model, tell: Tell
) -> SavedFit | None:
    """Reads the first one that all can read."""
    for number, path in enumerate(checkpoints):
        found, failure = _try_to_read(path, model, trainers)
        failures = group.agree(f"{key}/read-{number}", failure, lambda said: said)
        process = next((process for process, each in enumerate(failures) if each), None)
        if process is None:
            return found
        text = f"process {process}: {failures[process]['text']}"
        if failures[process]["is_mismatch"]:
            raise StructureMismatch(text)
        tell(f"{path} cannot be resumed from, an older checkpoint is tried: {text}")
    _refuse_all(checkpoints)
    return None


def _next_key() -> str:
    return f"offstep/resume/{next(_meetings)}"


def _try_to_read(path: Readable, model: Model, trainers: Trainers) -> tuple[SavedFit | None, dict[str, Any] | None]:
    """Returns what was read, or what the others are to be told of why not."""
    try:
        return read_saved_fit(path, model, trainers.find_extra_name(path)), None
    except (OSError, ValueError) as error:
        return None, {"text": str(error), "is_mismatch": isinstance(error, StructureMismatch)}


# ------------------------------------------------------------------------------------------------------------- reading


def read_saved_fit(path: Readable, model: Model, extra_name: str = EXTRA_NAME) -> SavedFit:
    """Reads a checkpoint into a model, and what lies beside its arrays.

    Args:
        path: The checkpoint.
        model: The model, built.
        extra_name: This process's file; where it is not there, other processes trained, and the primary's is read.
    """
    name = extra_name if (path / extra_name).is_file() else EXTRA_NAME
    extra, large = _unpack(lambda each: attachments.read(path / each), name)
    restore(model, path)
    return SavedFit(path, keras_state.live_arrays(model), extra, large)


def read_snapshot(snapshot: memory_tier.Inheritance, model: Model) -> SavedFit:
    """Does what `read_saved_fit` does, from the memory of a writer whose trainer is dead."""
    path = Path(snapshot.job.target)
    extra, large = _unpack(lambda each: attachments.read(snapshot.attached_file(each)), EXTRA_NAME)
    with closing(SlotReader(path, snapshot.plan, snapshot.slot, snapshot.job.manifest)) as reader:
        restore_from(model, reader)
    return SavedFit(path, keras_state.live_arrays(model), extra, large)


def _unpack(read: Callable[[str], Value], name: str) -> tuple[dict[str, Value], dict[str, Value]]:
    extra: dict[str, Value] = read(name)
    if extra["version"] > VERSION:
        raise ValueError(f"it was written by a newer offstep (version {extra['version']} of its extra file)")
    return extra, {key: read(large_name(name, key)) for key in extra["large"]}
