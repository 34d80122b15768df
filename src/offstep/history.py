"""What a log of events says: the runs in it, their saves and batches, and how each of them ended."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from offstep import event_log
from offstep.errors import CheckpointNotFound, UnsupportedFormat

Event = Mapping[str, Any]  # JSON


@dataclass(frozen=True)
class Save:
    """One save. Times are seconds since the epoch, or lengths in seconds; see `records.SaveStats`.

    Attributes:
        began: When its hook began on the training thread.
        durable_seconds: From then on; `None` while it is on its way, failed or skipped.
        error: Why it failed.
        is_skipped: Whether it was skipped, or replaced by a newer one.
        is_retired: Whether a later save has logged that it went.
    """

    step: int
    path: str
    began: float
    state_bytes: int = 0
    stall_seconds: float = 0.0
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0
    durable_seconds: float | None = None
    write_seconds: float = 0.0
    cpu_seconds: float = 0.0
    written_bytes: int = 0
    retired: tuple[str, ...] = ()
    retire_seconds: float = 0.0
    error: str | None = None
    is_skipped: bool = False
    is_retired: bool = False

    @property
    def durable_at(self) -> float | None:
        """When it became durable."""
        return None if self.durable_seconds is None else self.began + self.durable_seconds

    @property
    def durable_after_seconds(self) -> float | None:
        """From when its state was computed until it was durable."""
        return None if self.durable_seconds is None else max(0.0, self.durable_seconds - self.compute_seconds)

    @property
    def is_pending(self) -> bool:
        """Whether it is neither durable nor failed nor skipped, as far as the log goes."""
        return self.durable_seconds is None and self.error is None and not self.is_skipped


@dataclass(frozen=True)
class Batches:
    """Some batches in a row; see `batch_times.Summary`. `began` and `ended` are seconds since the epoch."""

    began: float
    ended: float
    step: int
    count: int
    seconds: float
    median_seconds: float
    max_seconds: float
    is_writing: bool
    is_warm_up: bool


@dataclass
class Run:
    """One `fit`, as far as the log goes. Times are seconds since the epoch.

    Attributes:
        name: Tells it from the others in the log.
        began: When it began.
        last_at: When it logged last.
        filepath: The template that it saved by.
        versions: Of libraries, by name.
        has_ended: Whether `fit` came to its end.
        saves: In their order.
        batches: In their order.
        epochs: When each epoch ended, by its number from 1.
    """

    name: str
    began: float
    last_at: float
    filepath: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    has_ended: bool = False
    saves: list[Save] = field(default_factory=list)
    batches: list[Batches] = field(default_factory=list)
    epochs: list[tuple[int, float]] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last step that the log knows of."""
        return max([*(part.step for part in self.batches[-1:]), *(save.step for save in self.saves[-1:])], default=0)

    @property
    def durable(self) -> list[Save]:
        """The saves that have become durable."""
        return [save for save in self.saves if save.durable_seconds is not None]


@dataclass(frozen=True)
class History:
    """What a log holds.

    Attributes:
        path: The log.
        runs: Oldest first; at least one.
        unreadable: How many lines are no events of ours, or not whole.
    """

    path: Path
    runs: tuple[Run, ...]
    unreadable: int


def find_log(path: Path) -> Path:
    """Returns the log that `path` is, or that is in it under its usual name.

    Raises:
        CheckpointNotFound: there is none.
    """
    if not path.exists():
        raise CheckpointNotFound(f"{path} does not exist")
    if not path.is_dir():
        return path
    if (path / event_log.NAME).exists():
        return path / event_log.NAME
    raise CheckpointNotFound(
        f"{path} holds no {event_log.NAME}; give the file that event_log=... of the callback named"
    )


def read_history(path: Path) -> History:
    """Reads a log. Lines that are no events of ours are counted and left out: a killed run leaves half a line.

    Raises:
        CheckpointNotFound: it is empty.
        UnsupportedFormat: none of its lines is an event of ours, or a newer version has written it.
        OSError: it cannot be read.
    """
    runs: dict[str, _Reader] = {}
    unreadable = 0
    with path.open("rb") as lines:
        for line in lines:
            event = _parse(line)
            if event is None or not _take_in(event, runs):
                unreadable += bool(line.strip())
    if not runs and unreadable == 0:
        raise CheckpointNotFound(f"{path} is empty: no event was logged")
    if not runs:
        raise UnsupportedFormat(f"{path} is no event log of offstep: none of its {unreadable} lines is an event")
    return History(path, tuple(reader.finish() for reader in runs.values()), unreadable)


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:  # also what is no UTF-8
        return None
    return event if isinstance(event, dict) else None


def _take_in(event: Event, runs: dict[str, _Reader]) -> bool:
    try:
        name, kind = _text(event, "run"), _text(event, "event")
        if kind == "begin":
            runs[name] = _Reader(name, event)
        elif name in runs:
            runs[name].take_in(kind, event)
        else:
            return False
    except UnsupportedFormat:  # a ValueError too
        raise
    except (KeyError, TypeError, ValueError):
        return False
    return True


class _Reader:
    """Puts the events of one run together."""

    def __init__(self, name: str, begin: Event) -> None:
        version = int(_number(begin, "version"))
        if version > event_log.VERSION:
            raise UnsupportedFormat(
                f"the log has version {version}; this offstep reads up to {event_log.VERSION}: update it"
            )
        began = _number(begin, "time")
        versions = begin.get("versions")
        self._run = Run(name, began, began, str(begin.get("filepath", "")))
        if isinstance(versions, dict):
            self._run.versions = {str(library): str(text) for library, text in versions.items()}
        self._saves: dict[int, Save] = {}  # by number, so in their order

    def take_in(self, kind: str, event: Event) -> None:
        """Takes an event in; those of kinds that are unknown count as a sign of life only."""
        run, at = self._run, _number(event, "time")
        match kind:
            case "snapshot":
                self._saves[int(_number(event, "save"))] = _read_snapshot(event)
            case "durable" | "failed":
                number = int(_number(event, "save"))
                self._saves[number] = _settle(self._saves[number], kind, event)
            case "skipped":
                self._skip(event, at)
            case "batches":
                run.batches.append(_read_batches(event, at))
            case "epoch":
                run.epochs.append((int(_number(event, "epoch")), at))
            case "end":
                run.has_ended = True
        run.last_at = max(run.last_at, at)

    def _skip(self, event: Event, at: float) -> None:
        number = event.get("save")
        if number is not None:
            self._saves[number] = replace(self._saves[number], is_skipped=True)
        else:  # it never had a snapshot, so no number either
            self._saves[-len(self._saves) - 1] = Save(
                int(_number(event, "step")), _text(event, "path"), at, is_skipped=True
            )

    def finish(self) -> Run:
        """Returns the run; all its events have been taken in."""
        saves = list(self._saves.values())
        newest = {save.path: index for index, save in enumerate(saves) if save.durable_seconds is not None}
        for index, save in enumerate(saves):
            for path in save.retired:
                old = newest.get(path, index)
                if old < index:
                    saves[old] = replace(saves[old], is_retired=True)
        self._run.saves = _mark_replaced(saves)
        return self._run


def _mark_replaced(saves: list[Save]) -> list[Save]:
    """Marks as retired what a later durable save to the same path has replaced."""
    seen: set[str] = set()
    marked = []
    for save in reversed(saves):
        is_durable = save.durable_seconds is not None
        marked.append(replace(save, is_retired=save.is_retired or (is_durable and save.path in seen)))
        if is_durable:
            seen.add(save.path)
    return marked[::-1]


def _read_snapshot(event: Event) -> Save:
    return Save(
        step=int(_number(event, "step")),
        path=_text(event, "path"),
        began=_number(event, "began"),
        state_bytes=int(_number(event, "state_bytes")),
        stall_seconds=_number(event, "stall_seconds"),
        wait_seconds=_number(event, "wait_seconds"),
        compute_seconds=_number(event, "compute_seconds"),
    )


def _settle(save: Save, kind: str, event: Event) -> Save:
    save = replace(save, step=int(_number(event, "step")), path=_text(event, "path"))
    if kind == "failed":
        return replace(save, error=_text(event, "error"))
    return replace(
        save,
        durable_seconds=_number(event, "durable_seconds"),
        write_seconds=_number(event, "write_seconds"),
        cpu_seconds=_number(event, "cpu_seconds"),
        written_bytes=int(_number(event, "written_bytes")),
        retired=tuple(str(path) for path in event.get("retired", ())),
        retire_seconds=_number(event, "retire_seconds"),
    )


def _read_batches(event: Event, at: float) -> Batches:
    count = int(_number(event, "count"))
    if count < 1:
        raise ValueError(count)
    return Batches(
        began=min(_number(event, "began"), at),
        ended=at,
        step=int(_number(event, "step")),
        count=count,
        seconds=_number(event, "seconds"),
        median_seconds=_number(event, "median_seconds"),
        max_seconds=_number(event, "max_seconds"),
        is_writing=event["is_writing"] is True,
        is_warm_up=event["is_warm_up"] is True,
    )


def _number(event: Event, name: str) -> float:
    value = event[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(name)
    return float(value)


def _text(event: Event, name: str) -> str:
    value = event[name]
    if not isinstance(value, str):
        raise TypeError(name)
    return value
