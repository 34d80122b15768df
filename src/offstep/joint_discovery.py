"""Which checkpoint several training processes take together: a step on disks of their own, or one in a store."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from offstep import catalog
from offstep.coordination import PRIMARY, Group, ProcessMissing, ServiceLost
from offstep.discovery import READ_THREADS, Verify, list_checkpoints, open_checkpoint
from offstep.errors import CheckpointDamaged, CheckpointNotFound, UnsupportedFormat
from offstep.formats.local_reader import LocalReader, list_common_steps, list_parts, list_saves
from offstep.manifest import Manifest
from offstep.stored import Reader
from offstep.stores.path import Readable

_KEY = "offstep/restore"
_restores = itertools.count(1)  # all processes restore the same, in the same order

Json = Any


class Choice(NamedTuple):
    """A step, and whether each process has it on a disk of its own; else it is in the store."""

    is_own: bool
    step: int


class Held(NamedTuple):
    """What a process has of a step on its own disk.

    Attributes:
        save: Tells its save from others.
        parts: Of which processes.
        whole: How many of them all processes together must have; 0 where that is not asked.
    """

    save: str
    parts: Sequence[int] = ()
    whole: int = 0


def next_key() -> str:
    """Returns a key for the next restore, the same in all processes."""
    return f"{_KEY}/{next(_restores)}"


def may_be_on_own_disks(places: Sequence[Readable], *, is_spread: bool) -> bool:
    """Returns whether several processes have to agree on what they restore: the first place is no directory of steps
    that all see.

    Args:
        places: A directory of this machine, and the store behind it if there is one: then a host that has lost its disk
            finds nothing in the first.
        is_spread: Whether what is restored spans several processes, so that all of them restore it. Else nobody waits
            for others who may not come, unless his disk says that it has parts of steps.
    """
    root, has_store = places[0], len(places) > 1
    try:
        if not isinstance(root, Path) or root.is_file():
            return False
        return bool(list_parts(root)) or (is_spread and has_store and not catalog.named_steps(root))
    except OSError:  # the others wait to hear that
        return is_spread and has_store


def open_together(group: Group, key: str, places: Sequence[Readable], *, verify: Verify) -> Reader:
    """Opens the newest step that each process can open, on its own disk or in the store: in all of them the same.

    Waits for the other processes: all restore at the same time.

    Args:
        group: The processes.
        key: See `next_key`.
        places: See `may_be_on_own_disks`.
        verify: See `discovery.Verify`.

    Raises:
        CheckpointNotFound: there is none, or a process does not say what it has.
        OSError: the store cannot be asked, and there is no other step.
    """
    root, store = places[0], places[1] if len(places) > 1 else None
    assert isinstance(root, Path), "may_be_on_own_disks comes first"
    own = _find_own(group, root, takes_others=store is None)
    try:
        choices = agree_on_choices(group, key, own, store)
        _forget_before(group, key)
        for number, choice in enumerate(choices):
            held = own[choice.step] if choice.is_own else None
            reader, failure = _try_to_open(group, choice, root if held else store, held, verify)
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
    except (ProcessMissing, ServiceLost) as error:
        raise CheckpointNotFound(f"it is not known which steps all processes have: {error}") from error
    raise CheckpointNotFound(_describe_nothing(places, choices))


def agree_on_choices(group: Group, key: str, own: Mapping[int, Held], store: Readable | None) -> list[Choice]:
    """Returns the steps that all processes can take, the newest first; one that is in both places, from the disks.

    Args:
        group: The processes.
        key: See `Group.agree`.
        own: The steps on this process's own disk.
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


def name_saves(steps: Mapping[int, Manifest], processes: int | None) -> dict[int, Held]:
    """Returns what tells the saves of steps on this machine from others.

    Args:
        steps: The steps.
        processes: How many there are: what was saved by more or by fewer has other parts, which nobody may have here,
            and is left out. `None` takes any.
    """
    return {
        step: Held(written.save)
        for step, written in steps.items()
        if processes is None or (written.part is not None and written.part[1] == processes)
    }


def _ask(store: Readable) -> Json:
    try:
        return {"stored": [int(path.name) for path in list_checkpoints(store) if path.name.isdecimal()]}
    except OSError as error:
        return {"trouble": str(error)}


def _find_own(group: Group, root: Path, *, takes_others: bool) -> dict[int, Held]:
    """Returns the steps on this process's own disk; what another number of processes has saved with `takes_others`.

    What lies there since a process was on another host is not asked whether it has them too.
    """
    try:
        parts = list_parts(root)
        found = {step: _hold(group, written) for step, written in list_saves(parts).items()}
        own = {step: held for step, held in found.items() if held is not None}
        others = name_saves(list_common_steps(parts), None) if takes_others else {}
    except (OSError, ValueError) as error:  # then it is as if there were none; the others wait to hear that
        warnings.warn(f"{root} is passed over, it cannot be read: {error}", RuntimeWarning, stacklevel=5)
        return {}
    return others | own


def _hold(group: Group, written: Sequence[Manifest]) -> Held | None:
    """Returns what the parts of a step are, if they are of as many processes as there are now: this process's, if it
    is there, and those of the same save.
    """
    found = [(each.part[0], each.save) for each in written if each.part is not None and each.part[1] == group.count]
    if not found:
        return None
    save = dict(found).get(group.index, found[0][1])
    return Held(save, [part for part, name in found if name == save], group.count)


def _forget_before(group: Group, key: str) -> None:
    """Deletes what was said for the restore before, which all have done with: nobody shall take it for this one's."""
    if group.index == PRIMARY:
        start, _, number = key.rpartition("/")
        with contextlib.suppress(ServiceLost):  # what follows says so
            group.delete(f"{start}/{int(number) - 1}")


def _choose(said: list[Json]) -> Json:
    held = [{step: Held(*entry) for step, entry in each["own"]} for each in said]
    own = [step for step in held[0] if _is_whole([each.get(step) for each in held])]
    choices = dict.fromkeys(said[PRIMARY]["stored"], False) | dict.fromkeys(own, True)
    ordered = [(choices[step], step) for step in sorted(choices, reverse=True)]
    return {"choices": ordered, "trouble": said[PRIMARY]["trouble"]}


def _is_whole(held: Sequence[Held | None]) -> bool:
    """Returns whether all have parts of one save, and together all of them."""
    found = [each for each in held if each is not None]
    parts = {part for each in found for part in each.parts}
    is_one = len(found) == len(held) and len({each.save for each in found}) == 1
    return is_one and all(parts >= set(range(each.whole)) for each in found)


def _try_to_open(
    group: Group, choice: Choice, place: Readable | None, held: Held | None, verify: Verify
) -> tuple[Reader | None, str | None]:
    """Returns what was opened, or what the others are to be told of why not."""
    reader: Reader | None = None
    try:
        if held is not None and isinstance(place, Path):
            reader = _open_own(group, place, choice.step, held)
        else:
            assert place is not None, "what is on no disk is in the store"
            reader = open_checkpoint(place / str(choice.step))
        if verify is True or (verify == "fast" and reader.is_checked_fast):
            reader.verify(reader.contents.leaves, READ_THREADS)
    except (CheckpointDamaged, CheckpointNotFound, UnsupportedFormat, OSError) as error:
        if reader is not None:
            reader.close()
        return None, str(error)
    return reader, None


def _open_own(group: Group, root: Path, step: int, held: Held) -> Reader:
    reader = LocalReader(root, step, held.save)
    if held.whole and group.index not in held.parts:  # a process of another number saved here: does it hold all?
        try:
            reader.verify(reader.contents.leaves, READ_THREADS, is_partial=False)
        except BaseException:
            reader.close()
            raise
    return reader


def _say_if_older(own: Iterable[int], choice: Choice, root: Path) -> None:
    newer = [step for step in own if step > choice.step]
    if newer:
        text = f"step {max(newer)} in {root} is passed over: not all processes have it, so that all take {choice.step}"
        warnings.warn(text, RuntimeWarning, stacklevel=5)


def _describe_nothing(places: Sequence[Readable], choices: Sequence[Choice]) -> str:
    shown = " and ".join(map(str, places))
    reason = "can read" if choices else "have: one that some lack was never durable"
    return f"there is no step in {shown} that all processes {reason}"
