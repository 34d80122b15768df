"""Finds checkpoints in a directory, whatever their format, and opens them for reading."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PosixPath
from typing import Any, Literal

from offstep import catalog
from offstep.cards import Row, make_card
from offstep.errors import CheckpointDamaged, CheckpointNotFound, OffstepError, UnsupportedFormat
from offstep.formats import file_manifest
from offstep.formats.keras_reader import LEGACY_SUFFIX, SUFFIXES, KerasReader
from offstep.formats.local_reader import LocalReader, list_common_steps, list_parts
from offstep.formats.orbax_reader import OrbaxReader, find_item, parse_manifest, read_manifest
from offstep.stored import Reader
from offstep.stores.path import Readable, StorePath, fetch, open_place
from offstep.stores.staging import MARKER_NAME
from offstep.words import show_count, spell_bytes

_STEP_NAME = re.compile(r"0|[1-9][0-9]*")
Verify = bool | Literal["fast"]
"""Whether to check all checksums, none, or those that cost much less than reading everything."""

Age = tuple[int, ...]

READ_THREADS = max(1, min(8, os.cpu_count() or 1))


class CheckpointPath(PosixPath):
    """The path of a checkpoint; a notebook shows what it holds."""

    __slots__ = ()

    def _repr_html_(self) -> str | None:
        try:
            reader = open_checkpoint(self)
        except (OffstepError, OSError):  # it has gone, or this is the path of something else
            return None
        try:
            return make_card("checkpoint", str(self), _describe(reader))
        finally:
            reader.close()


def _show(path: Readable) -> Readable:
    return CheckpointPath(path) if isinstance(path, Path) else path


def _describe(reader: Reader) -> list[Row]:
    contents, manifest = reader.contents, reader.contents.manifest
    size = spell_bytes(sum(leaf.size_bytes for leaf in contents.leaves))
    rows = [("format", contents.format), ("holds", f"{show_count(len(contents.leaves), 'leaf', 'leaves')}, {size}")]
    counts = {name: manifest.get(name) for name in ("step", "epoch", "batch")}
    rows += [(name, f"{count:,}") for name, count in counts.items() if isinstance(count, int)]
    rows += [(name, f"{value:.6g}") for name, value in read_metrics(manifest).items()]
    if manifest.get("nonfinite"):
        rows.append(("NaN or infinite", show_count(manifest["nonfinite"], "value")))
    return rows


def open_checkpoint(path: Readable) -> Reader:
    """Opens one checkpoint.

    Raises:
        CheckpointNotFound: there is nothing.
        UnsupportedFormat: it is no checkpoint, or one of a newer version.
        CheckpointDamaged: it is not what was written, as far as its index and the sizes of its files tell.
    """
    if not path.exists():
        raise CheckpointNotFound(f"{path} does not exist")
    if path.is_dir():
        if catalog.is_unfinished(path):
            raise CheckpointDamaged(f"{path} was never committed: {MARKER_NAME} is missing; restore another checkpoint")
        return OrbaxReader(path)
    if path.name.endswith((*SUFFIXES, LEGACY_SUFFIX)):
        return KerasReader(path, fetch(path)) if isinstance(path, StorePath) else KerasReader(path)
    raise UnsupportedFormat(
        f"{path} is no checkpoint: expected a directory that Orbax or offstep wrote, or a file that ends in "
        f"{', '.join((*SUFFIXES, LEGACY_SUFFIX))}"
    )


def open_newest(path: Readable, *, verify: Verify) -> Reader:
    """Opens the checkpoint at `path`, or the newest valid one of the directory `path`.

    A newer one that is damaged is passed over with a warning.

    Raises:
        CheckpointNotFound: there is nothing, or nothing valid.
        UnsupportedFormat, CheckpointDamaged: see `open_checkpoint`; for a single checkpoint only.
    """
    if is_checkpoint(path) or not path.is_dir():
        return _open_checked(path, verify)
    parts = list_parts(path) if isinstance(path, Path) else []
    if parts and isinstance(path, Path):
        return open_parts(path, list_common_steps(parts), verify=verify)
    reader = next(_open_valid(path, verify), None)
    if reader is None:
        raise CheckpointNotFound(_describe_nothing(path))
    return reader


def open_parts(root: Path, steps: Collection[int], *, verify: Verify) -> Reader:
    """Opens the newest valid one of steps that processes have written to disks of their own; see `open_newest`.

    Raises:
        CheckpointNotFound: there is none that all have.
    """
    for step in sorted(steps, reverse=True):
        try:
            reader = LocalReader(root, step)
            if verify:
                reader.verify(reader.contents.leaves, READ_THREADS)
        except (CheckpointDamaged, UnsupportedFormat) as error:
            warnings.warn(f"step {step} in {root} is passed over: {error}", RuntimeWarning, stacklevel=4)
        else:
            return reader
    raise CheckpointNotFound(f"{root} holds no step that all processes have: one that some lack was never durable")


def place_tiers(path: catalog.Root, local: os.PathLike[str] | str | None) -> list[Readable]:
    """Returns where steps are looked for: the local tier first, if there is one."""
    return [*([] if local is None else [open_place(local)]), open_place(path)]


def open_newest_of(places: Sequence[Readable], *, verify: Verify) -> Reader:
    """Opens the newest valid checkpoint of several directories of steps; of equal steps that of the first.

    Of one place, it may be any that `open_newest` takes. A place that cannot be asked is passed over with a warning.

    Raises:
        CheckpointNotFound: there is nothing, or nothing valid.
        OSError: no place can be asked.
    """
    if len(places) == 1:
        return open_newest(places[0], verify=verify)
    for path in list_newest_of(places):
        try:
            return _open_checked(path, verify)
        except (CheckpointDamaged, UnsupportedFormat) as error:
            warnings.warn(f"{path} is passed over: {error}", RuntimeWarning, stacklevel=3)
    raise CheckpointNotFound(f"neither {' nor '.join(map(str, places))} holds a valid step")


def list_newest_of(places: Sequence[Readable]) -> list[Readable]:
    """Returns the steps of several directories, the newest first; of equal steps that of the first directory.

    Raises:
        OSError: no place can be asked.
    """
    found: list[tuple[int, int, Readable]] = []
    failures: list[OSError] = []
    for rank, place in enumerate(places):
        try:
            if isinstance(place, Path) and list_parts(place) and not catalog.named_steps(place):
                text = f"{place} is passed over: several processes have saved there, each what it held; here is one"
                warnings.warn(text, RuntimeWarning, stacklevel=3)
                continue
            found += [(-int(path.name), rank, path) for path in list_checkpoints(place) if path.name.isdecimal()]
        except OSError as error:
            failures.append(error)
    if failures and not found:
        raise failures[0]
    for failure in failures:
        warnings.warn(
            f"it is not known what is newest, one place cannot be asked: {failure}", RuntimeWarning, stacklevel=3
        )
    return [path for _, _, path in sorted(found, key=lambda entry: entry[:2])]


def latest(directory: catalog.Root, *, verify: bool = False) -> Readable | None:
    """Returns the newest valid checkpoint of a directory, whatever its format; `None` where there is none.

    Steps count by their number, files of one run by the order in which it saved them, all others by the time at which
    they were committed. One that is damaged is passed over with a warning that names it: its index cannot be read, or a
    file is missing or too short.

    Args:
        directory: Of steps, of files that Keras reads, or of such directories; it need not exist.
        verify: Read all of it and check every checksum too.
    """
    for reader in _open_valid(open_place(directory), verify):
        reader.close()
        return _show(reader.path)
    return None


def best(
    directory: catalog.Root,
    monitor: str = "val_loss",
    mode: Literal["auto", "min", "max"] = "auto",
    *,
    verify: bool = False,
) -> Readable | None:
    """Returns the valid checkpoint with the best value of a metric; `None` where there is no checkpoint.

    A value that is not finite is never best; of equal values the newest checkpoint's is.

    Args:
        directory: See `latest`.
        monitor: Name of the metric, as it was in the logs or in `Checkpointer.save(metrics=...)`.
        mode: Whether less or more is better; `"auto"` takes more for names with `acc`, `auc` or `f1`, else less.
        verify: See `latest`.

    Raises:
        ValueError: there are checkpoints, but none with that metric; or the mode is unknown.
    """
    sign = 1.0 if find_direction(monitor, mode) == "max" else -1.0
    found: Readable | None = None
    value = -math.inf
    seen: set[str] = set()
    count = 0
    for reader in _open_valid(open_place(directory), verify):
        reader.close()
        count += 1
        metrics = read_metrics(reader.contents.manifest)
        seen |= set(metrics)
        current = sign * metrics.get(monitor, math.nan)
        if math.isfinite(current) and current > value:  # newest first: an older one has to be better
            found, value = _show(reader.path), current
    if count and monitor not in seen:
        raise ValueError(
            f"none of the {count} checkpoints in {directory} has the metric {monitor!r}; they have "
            f"{sorted(seen) or 'none'}"
        )
    return found


def find_direction(monitor: str, mode: Literal["auto", "min", "max"] = "auto") -> Literal["min", "max"]:
    """Returns whether less or more of a metric is better; see `best`.

    Raises:
        ValueError: the mode is unknown.
    """
    if mode not in ("auto", "min", "max"):
        raise ValueError(f"mode must be 'auto', 'min' or 'max'. Received: {mode!r}")
    # As in Keras 2 and in most people's heads; the model, which Keras 3 asks, is not here.
    is_gain = any(part in monitor for part in ("acc", "auc", "f1"))
    return "max" if mode == "max" or (mode == "auto" and is_gain) else "min"


def read_metrics(manifest: Mapping[str, Any]) -> dict[str, float]:  # JSON
    """Returns the metrics that a checkpoint carries."""
    metrics = manifest.get("metrics") or {}
    return {str(name): float(value) for name, value in metrics.items() if isinstance(value, (int, float, str))}


def is_checkpoint(path: Readable) -> bool:
    """Returns whether `path` is one checkpoint rather than a directory of them."""
    return path.is_file() if not path.is_dir() else find_item(path) is not None


def list_checkpoints(directory: Readable) -> list[Readable]:
    """Returns what looks like committed checkpoints in a directory, newest first."""
    # Damaged ones too: whoever opens them says so.
    steps = [directory / str(step) for step in reversed(catalog.named_steps(directory))]
    steps = [step for step in steps if step.is_dir() and not catalog.is_unfinished(step)]
    if steps:
        return steps
    found: list[Readable] = []
    for entry in _list_entries(directory):
        is_file = entry.is_file() and entry.name.endswith(SUFFIXES)
        if is_file or (entry.is_dir() and is_checkpoint(entry)):
            found.append(entry)
        elif entry.is_dir():
            found += [entry / str(step) for step in catalog.list_steps(entry)]
    ages = _read_ages(found)
    return sorted(found, key=lambda path: (ages[path], str(path)), reverse=True)


def _read_ages(paths: Sequence[Readable]) -> dict[Readable, Age]:
    """Returns what orders checkpoints by their age.

    Those of one run as it saved them: a copy does not keep times, and a clock may be set back. Runs, and what nobody
    says the run of, by time; in a store, which tells no times, by the numbers in their names.
    """
    runs = {path: _read_place(path) for path in paths}
    times = {path: _read_time(path) for path in paths}
    newest: dict[str, Age] = {}
    for path, (run, _) in runs.items():
        newest[run] = max(newest.get(run, ()), times[path])
    return {path: (*(newest[run] if run else times[path]), at, *times[path]) for path, (run, at) in runs.items()}


def _read_place(path: Readable) -> tuple[str, int]:
    """Returns the run that wrote a checkpoint and its place in that, as far as it tells."""
    if isinstance(path, StorePath):
        return "", -1  # a request for each, where the name tells it too
    try:
        if path.is_dir():
            manifest = read_manifest(path)
        else:
            manifest = parse_manifest(text, path) if (text := file_manifest.read_text(path)) else {}
    except (OffstepError, OSError):  # whoever opens it says so
        return "", -1
    number = manifest.get("number")
    return ("", -1) if number is None else (manifest["run"], number)


def _read_time(path: Readable) -> Age:
    if isinstance(path, StorePath):
        return tuple(map(int, re.findall(r"\d{1,18}", str(path.address.key))))
    return (path.stat().st_mtime_ns,)


def _list_entries(directory: Readable) -> Sequence[Readable]:
    if not directory.is_dir():
        return []
    return [entry for entry in directory.iterdir() if not entry.name.startswith(".") and "-tmp" not in entry.name]


def _open_valid(directory: Readable, verify: Verify) -> Iterator[Reader]:
    for path in list_checkpoints(directory):
        try:
            reader = _open_checked(path, verify)
        except (CheckpointDamaged, UnsupportedFormat) as error:
            warnings.warn(f"{path} is passed over: {error}", RuntimeWarning, stacklevel=4)
        else:
            yield reader


def _open_checked(path: Readable, verify: Verify) -> Reader:
    reader = open_checkpoint(path)
    try:
        if verify is True or (verify == "fast" and reader.is_checked_fast):
            reader.verify(reader.contents.leaves, READ_THREADS)
    except BaseException:
        reader.close()
        raise
    return reader


def _describe_nothing(path: Readable) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return f"{path} is empty: no checkpoint was committed there"
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{path} holds no valid checkpoint, only {shown}"
