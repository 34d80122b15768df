"""What lies in a directory of checkpoints, told from names, sizes and small documents alone."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offstep import catalog
from offstep.discovery import list_checkpoints, read_metrics
from offstep.errors import CheckpointDamaged, CheckpointNotFound, UnsupportedFormat
from offstep.formats import file_manifest
from offstep.formats.keras_reader import SUFFIXES
from offstep.formats.orbax_reader import find_item, parse_manifest, read_manifest
from offstep.stores.path import Readable, StorePath

_STEP_NAME = re.compile(r"0|[1-9][0-9]*")
_METADATA_NAME = "_CHECKPOINT_METADATA"
_FORMATS = {".weights.h5": "keras_weights", ".keras": "keras_archive", ".h5": "keras_legacy"}


@dataclass(frozen=True)
class Entry:
    """One checkpoint as a list shows it.

    Attributes:
        path: The checkpoint.
        step: Training step, where it or its name says so.
        format: `"orbax_directory"`, `"keras_weights"`, `"keras_archive"` or `"keras_legacy"`.
        saved_at: Seconds since the epoch.
        size_bytes: Of all its files, those that it shares with other checkpoints included.
        metrics: Numbers kept with it.
        nonfinite: How many weights are NaN or infinite; `None` where nobody counted.
        epoch: From 1, where it says so.
        problem: Why it is not whole, as far as names and sizes tell; else empty.
    """

    path: Readable
    step: int | None
    format: str
    saved_at: float
    size_bytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    nonfinite: int | None = None
    epoch: int | None = None
    problem: str = ""

    @property
    def is_whole(self) -> bool:
        return not self.problem


def list_entries(path: Readable) -> list[Entry]:
    """Returns the checkpoints in a directory, broken ones too, oldest first; or the one that `path` is.

    Steps count by their number, others by the time at which they were committed. No array is read.

    Raises:
        CheckpointNotFound: there is nothing at `path`.
        UnsupportedFormat: it is a file that is no checkpoint.
        OSError: it cannot be read.
    """
    if not path.exists():
        raise CheckpointNotFound(f"{path} does not exist")
    if path.is_file() or find_item(path) is not None:
        return [describe(path)]
    found = [describe(candidate) for candidate in _find_candidates(path, is_outermost=True)]
    return sorted(found, key=lambda entry: (-1 if entry.step is None else entry.step, entry.saved_at))


def describe(path: Readable) -> Entry:
    """Describes one checkpoint.

    Raises:
        UnsupportedFormat: it is a file that is no checkpoint.
        OSError: it cannot be read.
    """
    return _describe_directory(path) if path.is_dir() else _describe_file(path)


def _list_sizes(directory: Path) -> Iterator[int]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _list_sizes(Path(entry.path))
            else:
                yield entry.stat(follow_symlinks=False).st_size


def _find_candidates(directory: Readable, *, is_outermost: bool) -> Iterator[Readable]:
    if isinstance(directory, StorePath):
        yield from list_checkpoints(directory)
        return
    with os.scandir(directory) as entries:
        found = [entry for entry in entries if not entry.name.startswith(".") and "-tmp" not in entry.name]
    for entry in found:
        path = Path(entry.path)
        if not entry.is_dir():
            if entry.name.endswith(SUFFIXES):
                yield path
        elif _STEP_NAME.fullmatch(entry.name) or find_item(path) is not None:
            yield path
        elif is_outermost and catalog.list_steps(path):
            yield from _find_candidates(path, is_outermost=False)


def _describe_directory(path: Readable) -> Entry:
    manifest, problem = _read_manifest(path)
    metadata = _read_metadata(path)
    committed = metadata.get("commit_timestamp_nsecs")
    step = manifest.get("step", int(path.name) if _STEP_NAME.fullmatch(path.name) else None)
    return Entry(
        path=path,
        step=step,
        format="orbax_directory",
        saved_at=committed / 1e9 if isinstance(committed, int) else _read_time(path),
        size_bytes=sum(_list_sizes(path)) if isinstance(path, Path) else _add_up(manifest),
        metrics=read_metrics(manifest) or read_metrics(metadata),
        nonfinite=manifest.get("nonfinite"),
        epoch=manifest.get("epoch"),
        problem=problem or _find_problem(path),
    )


def _read_time(path: Readable) -> float:
    return path.stat().st_mtime if isinstance(path, Path) else 0.0  # a store does not tell


def _add_up(manifest: Mapping[str, Any]) -> int:  # JSON
    return sum(record.size for record in manifest.get("files", {}).values())


def _read_manifest(path: Readable) -> tuple[Mapping[str, Any], str]:  # JSON
    try:
        return read_manifest(path), ""
    except (CheckpointDamaged, UnsupportedFormat) as error:
        return {}, str(error)


def _read_metadata(path: Readable) -> Mapping[str, Any]:  # JSON
    try:
        data = json.loads((path / _METADATA_NAME).read_bytes())
    except (FileNotFoundError, ValueError):  # Orbax can do without it
        return {}
    return data if isinstance(data, dict) else {}


def _find_problem(path: Readable) -> str:
    item = find_item(path)
    if item is None:
        return "it holds no arrays: it was never committed, or files are missing"
    if item.name != "pytree" or not (item / "manifest.ocdbt").is_file():
        return ""  # a layout that offstep does not write, and whose files nothing lists
    return catalog.find_fault(path) or ""


def _describe_file(path: Readable) -> Entry:
    suffix = next((suffix for suffix in _FORMATS if path.name.endswith(suffix)), None)
    if suffix is None:
        raise UnsupportedFormat(
            f"{path} is no checkpoint: expected a directory that Orbax or offstep wrote, or a file that ends in "
            f"{', '.join(_FORMATS)}"
        )
    if isinstance(path, StorePath):
        return _describe_object(path, suffix)
    problem = _find_fault_of_archive(path) if suffix == ".keras" else _find_fault_of_hdf5(path)
    manifest: Mapping[str, Any] = {}  # JSON
    if not problem:
        try:
            text = file_manifest.read_text(path)
            manifest = parse_manifest(text, path) if text else {}
        except (CheckpointDamaged, UnsupportedFormat) as error:
            problem = str(error)
    status = path.stat()
    return Entry(
        path=path,
        step=manifest.get("step"),
        format=_FORMATS[suffix],
        saved_at=status.st_mtime,
        size_bytes=status.st_size,
        metrics=read_metrics(manifest),
        nonfinite=manifest.get("nonfinite"),
        epoch=manifest.get("epoch"),
        problem=problem,
    )


def _describe_object(path: StorePath, suffix: str) -> Entry:
    """Describes a file in a store by its end, where its manifest is; nobody else tells its time or its size."""
    text = file_manifest.read_text(path)
    manifest = parse_manifest(text, path) if text else {}
    return Entry(
        path=path,
        step=manifest.get("step"),
        format=_FORMATS[suffix],
        saved_at=0.0,
        size_bytes=_add_up(manifest),
        metrics=read_metrics(manifest),
        nonfinite=manifest.get("nonfinite"),
        epoch=manifest.get("epoch"),
    )


def _find_fault_of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            has_weights = "model.weights.h5" in archive.namelist()
            return "" if has_weights else "it has no model.weights.h5: it is no .keras file of Keras 3"
    except (zipfile.BadZipFile, ValueError) as error:
        return f"it cannot be read as an archive ({error})"


def _find_fault_of_hdf5(path: Path) -> str:
    import h5py  # Orbax directories are listed without it

    with path.open("rb"):  # says plainly that it cannot be read, where that is so
        pass
    try:
        with h5py.File(path, "r"):
            return ""
    except OSError as error:
        return f"it cannot be read as HDF5 ({error})"
