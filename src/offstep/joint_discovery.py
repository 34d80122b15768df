"""Which checkpoint several training processes take together: a step on disks of their own, or one in a store."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from offstep import catalog
from offstep.coordination import PRIMARY, Group, ProcessMissing, list_common
from offstep.discovery import READ_THREADS, Verify, list_checkpoints, open_checkpoint
from offstep.errors import CheckpointDamaged, CheckpointNotFound, UnsupportedFormat
from offstep.formats.local_reader import LocalReader, list_common_steps, list_parts
from offstep.manifest import Manifest
from offstep.stored import Reader
from offstep.stores.path import Readable

_restores = itertools.count(1)  # all processes restore the same, in the same order

Json = Any


class Choice(NamedTuple):
    """A step, and whether each process has it on a disk of its own; else it is in the store."""

    is_own: bool
    step: int


def may_be_on_own_disks(places: Sequence[Readable]) -> bool:
    """Returns whether several processes have to agree on what they restore: the first place is no directory of steps
    that all see.

    Args:
        places: A directory of this machine, and the store behind it if there is one: then a host that has lost its disk
            finds nothing in the first.
    """
    root = places[0]
    if not isinstance(root, Path) or root.is_file():
        return False
    return bool(list_parts(root)) or (len(places) > 1 and not catalog.named_steps(root))


def open_together(group: Group, places: Sequence[Readable], *, verify: Verify) -> Reader:
    """Opens the newest step that each process can open, on its own disk or in the store: in all of them the same.

    Waits for the other processes: all restore at the same time.

    Args:
        group: The processes.
        places: See `may_be_on_own_disks`.
        verify: See `discovery.Verify`.

    Raises:
        CheckpointNotFound: there is none, or a process does not say what it has.
        OSError: the store cannot be asked, and there is no other step.
    """
    root, store = places[0], places[1] if len(places) > 1 else None
    assert isinstance(root, Path), "may_be_on_own_disks comes first"
    key = f"offstep/restore/{next(_restores)}"
    try:
        own = name_saves(list_common_steps(list_parts(root)), None if store is None else group.count)
        for number, choice in enumerate(choices := agree_on_choices(group, key, own, store)):
            reader, failure = _try_to_open(choice, root, store, verify)
            failures = group.agree(f"{key}/open-{number}", failure, lambda said: said)
            process = next((process for process, each in enumerate(failures) if each), None)
            if process is None and reader is not None:
                if not choice.is_own:
                    _say_if_older(own, choice, root)
                return reader
            if reader is not None:
                reader.close()
            text = f"step {choice.step} is passed over: process {process}: {failures[process or 0]}"
            warnings.warn(text, RuntimeWarning, stacklevel=4)
    except ProcessMissing as error:
        raise CheckpointNotFound(f"it is not known which steps all processes have: {error}") from error
    raise CheckpointNotFound(_describe_nothing(places, choices))


def agree_on_choices(group: Group, key: str, own: Mapping[int, str], store: Readable | None) -> list[Choice]:
    """Returns the steps that all processes can take, the newest first; one that is in both places, from the disks.

    Args:
        group: The processes.
        key: See `Group.agree`.
        own: The steps on this process's own disk, each with what tells its save from others.
        store: The store behind the disks, which the primary asks; the same in all processes.

    Raises:
        ProcessMissing, ServiceLost: see `Group.agree`.
        OSError: the store cannot be asked, and there is no step that all have.
    """
    said: Json = {"own": list(own.items()), "stored": [], "trouble": ""}
    if store is not None and group.index == PRIMARY:
        said |= _ask(store)
    decided = group.agree(key, said, _choose)
    if decided["trouble"] and not decided["choices"]:
        raise OSError(decided["trouble"])
    if decided["trouble"]:
        text = f"it is not known what is newest, one place cannot be asked: {decided['trouble']}"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
    return [Choice(*choice) for choice in decided["choices"]]


def name_saves(steps: Mapping[int, Manifest], processes: int | None) -> dict[int, str]:
    """Returns what tells the saves of steps on this machine from others.

    Args:
        steps: The steps.
        processes: How many there are: what was saved by more or by fewer has other parts, which nobody may have here,
            and is left out. `None` takes any.
    """
    return {
        step: written.save
        for step, written in steps.items()
        if processes is None or (written.part is not None and written.part[1] == processes)
    }


def _ask(store: Readable) -> Json:
    try:
        return {"stored": [int(path.name) for path in list_checkpoints(store) if path.name.isdecimal()]}
    except OSError as error:
        return {"trouble": str(error)}


def _choose(said: list[Json]) -> Json:
    own = [step for step, _ in list_common([list(map(tuple, each["own"])) for each in said])]
    choices = dict.fromkeys(said[PRIMARY]["stored"], False) | dict.fromkeys(own, True)
    ordered = [(choices[step], step) for step in sorted(choices, reverse=True)]
    return {"choices": ordered, "trouble": said[PRIMARY]["trouble"]}


def _try_to_open(
    choice: Choice, root: Path, store: Readable | None, verify: Verify
) -> tuple[Reader | None, str | None]:
    """Returns what was opened, or what the others are to be told of why not."""
    reader: Reader | None = None
    try:
        reader = LocalReader(root, choice.step) if choice.is_own or store is None else _open_stored(store, choice.step)
        if verify is True or (verify == "fast" and reader.is_checked_fast):
            reader.verify(reader.contents.leaves, READ_THREADS)
    except (CheckpointDamaged, CheckpointNotFound, UnsupportedFormat, OSError) as error:
        if reader is not None:
            reader.close()
        return None, str(error)
    return reader, None


def _open_stored(store: Readable, step: int) -> Reader:
    return open_checkpoint(store / str(step))


def _say_if_older(own: Iterable[int], choice: Choice, root: Path) -> None:
    newer = [step for step in own if step > choice.step]
    if newer:
        text = f"step {max(newer)} in {root} is passed over: not all processes have it, so that all take {choice.step}"
        warnings.warn(text, RuntimeWarning, stacklevel=5)


def _describe_nothing(places: Sequence[Readable], choices: Sequence[Choice]) -> str:
    shown = " and ".join(map(str, places))
    reason = "can read" if choices else "have: one that some lack was never durable"
    return f"there is no step in {shown} that all processes {reason}"
