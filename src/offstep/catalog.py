"""What is committed in a directory of steps, and what dead runs left behind there."""

from __future__ import annotations

import dataclasses
import os
import re
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

from offstep import manifest
from offstep.manifest import Manifest
from offstep.stores.path import Readable, StorePath, open_place
from offstep.stores.staging import MARKER_NAME
from offstep.temporary_names import FILE_IN_PROGRESS_PREFIX, OUR_MARK, REPLACED_PREFIX, TRASH_PREFIX

Root = os.PathLike[str] | str | StorePath
"""A directory of steps, in a file system or in a store."""

COMMIT_MARKERS = ("_CHECKPOINT_METADATA", "pytree/manifest.ocdbt")

# Leading zeros are refused: the path of a step must follow from its number.
_STEP_NAME = re.compile(r"0|[1-9][0-9]*")
_IN_PROGRESS_NAME = re.compile(rf"(0|[1-9][0-9]*){re.escape(OUR_MARK)}[0-9a-f-]+")
_UNFINISHED_FILE_NAME = re.compile(rf"{re.escape(FILE_IN_PROGRESS_PREFIX)}[0-9a-f-]+")
_REPLACED_NAME = re.compile(rf"{re.escape(REPLACED_PREFIX)}(?P<final>0|[1-9][0-9]*)-[0-9a-f]+")

# https://google.github.io/tensorstore/kvstore/ocdbt/: the magic (big-endian), then the manifest's own length
# (little-endian), which tells a truncated one.
_MANIFEST_MAGIC = b"\x0c\xdb\x3a\x2a"
_MANIFEST_LENGTH = struct.Struct("<Q")


def list_steps(root: Root) -> list[int]:
    """Returns the steps that are committed in `root` and whole, in ascending order; none where there is no `root`."""
    root = open_place(root)
    return [step for step in named_steps(root) if is_committed(root / str(step))]


def latest_step(root: Root) -> int | None:
    """Returns the greatest step that is committed in `root` and whole; a newer one that is not is warned of."""
    newest = next(find_whole(root), None)
    return None if newest is None else int(newest.name)


def find_whole(root: Root) -> Iterator[Readable]:
    """Yields the checkpoints that are committed in `root` and whole, newest first, and warns of the others.

    A warning points at the caller of who calls this.
    """
    root = open_place(root)
    for step in reversed(named_steps(root)):
        checkpoint = root / str(step)
        fault = find_fault(checkpoint)
        if fault is None:
            yield checkpoint
        elif checkpoint.is_dir() and not is_unfinished(checkpoint):
            text = f"{checkpoint} is no whole checkpoint and is passed over: {fault}"
            warnings.warn(text, RuntimeWarning, stacklevel=3)


def named_steps(root: Root) -> list[int]:
    """Returns the steps that have a name in `root`, whole or not, in ascending order."""
    return sorted(int(name) for name in _list_names(open_place(root)) if _STEP_NAME.fullmatch(name))


def leftovers(root: os.PathLike[str] | str) -> list[Path]:
    """Returns what we have in progress or in the trash in `root`, sorted by name; Orbax's own is not among it.

    A live writer's work is among it: whoever sweeps must know that there is none.
    """
    return sorted(
        Path(root, name)
        for name in _list_names(Path(root))
        if name.startswith(TRASH_PREFIX) or _IN_PROGRESS_NAME.fullmatch(name)
    )


def unfinished_files(folder: os.PathLike[str] | str) -> list[Path]:
    """Returns the single files that we have in progress in `folder`; a live writer's are among them."""
    return sorted(Path(folder, name) for name in _list_names(Path(folder)) if _UNFINISHED_FILE_NAME.fullmatch(name))


def replaced(root: os.PathLike[str] | str) -> dict[Path, Path]:
    """Returns the checkpoints in `root` that made room for a newer one, each with the name that it had."""
    found = ((name, _REPLACED_NAME.fullmatch(name)) for name in sorted(_list_names(Path(root))))
    return {Path(root, name): Path(root, match["final"]) for name, match in found if match is not None}


class Census:
    """The manifests of what is committed in directories of steps, read once for each checkpoint.

    The sizes of its files are compared each time: what damages a file does not tell the directory.
    """

    def __init__(self) -> None:
        self._known: dict[Readable, tuple[_Identity, Manifest]] = {}

    def look(self, root: Readable) -> list[Manifest]:
        """Returns the manifests of the whole checkpoints in `root`, by step; of one without, the step alone."""
        found = [(step, root / str(step)) for step in named_steps(root)]
        looked = [self._look_at(step, path) for step, path in found]
        present = {path for _, path in found}
        self._known = {path: entry for path, entry in self._known.items() if path.parent != root or path in present}
        return [written for written in looked if written is not None]

    def _look_at(self, step: int, path: Readable) -> Manifest | None:
        identity = _identify(path)
        known = self._known.get(path)
        if known is not None and known[0] == identity:
            return None if _find_missing(path, known[1]) else known[1]
        if identity is None or not is_committed(path):
            return None
        written = manifest.read(path) or Manifest(step)
        # The name counts: a checkpoint that was copied to another step is that step.
        self._known[path] = identity, dataclasses.replace(written, step=step)
        return self._known[path][1]


_Identity = tuple[int, int, int] | tuple[str, ...] | None


def _identify(path: Readable) -> _Identity:
    if isinstance(path, StorePath):  # no two attempts have data files of the same names
        return tuple(sorted(file.name for file in path.glob("pytree/d/*"))) or None
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def is_unfinished(checkpoint: Readable) -> bool:
    """Returns whether it is an attempt in a store that nobody has committed; what is on a disk has its name by then."""
    return isinstance(checkpoint, StorePath) and not (checkpoint / MARKER_NAME).is_file()


def abandoned(root: Readable, newest: int) -> list[StorePath]:
    """Returns the attempts in a store that nobody has committed, of steps before one that was: their writers died.

    The caller has the root for itself, and attempts no other step now.
    """
    if not isinstance(root, StorePath):
        return []
    attempts = (root / str(step) for step in named_steps(root) if step < newest)
    return [attempt for attempt in attempts if is_unfinished(attempt)]


def is_committed(checkpoint: Readable) -> bool:
    """Returns whether the directory is a committed checkpoint whose files have their sizes; contents are not read."""
    return find_fault(checkpoint) is None


def find_fault(checkpoint: Readable) -> str | None:
    """Says what keeps a directory from being a whole checkpoint: a marker, or a file that its manifest promises.

    Only `verify` looks at the contents. A checkpoint without a manifest, such as stock Orbax writes, needs the markers.
    In a store objects are whole or not there: their sizes are not asked for.
    """
    if is_unfinished(checkpoint):
        return f"{MARKER_NAME} is missing: it was never committed"
    for marker in COMMIT_MARKERS:
        if not (checkpoint / marker).is_file():
            return f"{marker} is missing"
    if not _is_whole_manifest(checkpoint / COMMIT_MARKERS[1]):
        return f"{COMMIT_MARKERS[1]} is cut short, or none"
    try:
        written = manifest.read(checkpoint)
    except ValueError as error:
        return f"{manifest.MANIFEST_NAME}: {error}"
    return None if written is None else _find_missing(checkpoint, written)


def _find_missing(checkpoint: Readable, written: Manifest) -> str | None:
    """Says which file of a manifest is missing or has another size, if one does."""
    faults = (_compare_size(checkpoint, name, record.size) for name, record in written.files.items())
    return next(filter(None, faults), None)


def _compare_size(checkpoint: Readable, name: str, expected: int) -> str | None:
    if isinstance(checkpoint, StorePath):
        return None if (checkpoint / name).is_file() else f"{name} is missing"
    try:
        size = os.stat(checkpoint / name).st_size
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    return None if size == expected else f"{name} has {size} bytes, expected {expected}"


def _list_names(root: Readable) -> list[str]:
    if isinstance(root, StorePath):
        return [path.name for path in root.iterdir()]
    try:
        return os.listdir(root)
    except FileNotFoundError:
        return []


def _is_whole_manifest(path: Readable) -> bool:
    try:
        with path.open("rb") as file:
            header = file.read(len(_MANIFEST_MAGIC) + _MANIFEST_LENGTH.size)
            size_bytes = file.seek(0, os.SEEK_END)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    magic, length = header[:4], header[4:]
    if magic != _MANIFEST_MAGIC or len(length) != _MANIFEST_LENGTH.size:
        return False
    return bool(_MANIFEST_LENGTH.unpack(length)[0] == size_bytes)
