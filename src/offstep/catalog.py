"""What is committed in a directory of steps, and what dead runs left behind there."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

COMMIT_MARKERS = ("_CHECKPOINT_METADATA", "pytree/manifest.ocdbt")
TRASH_PREFIX = ".offstep-trash-"

# Leading zeros are refused: the path of a step must follow from its number.
_STEP_NAME = re.compile(r"0|[1-9][0-9]*")
_IN_PROGRESS_NAME = re.compile(r"(0|[1-9][0-9]*)\.orbax-checkpoint-tmp.*", re.DOTALL)

# https://google.github.io/tensorstore/kvstore/ocdbt/: the magic (big-endian), then the manifest's own length
# (little-endian), which tells a truncated one.
_MANIFEST_MAGIC = b"\x0c\xdb\x3a\x2a"
_MANIFEST_LENGTH = struct.Struct("<Q")


def list_steps(root: os.PathLike[str] | str) -> list[int]:
    """Returns the steps that are committed in `root`, in ascending order; none where there is no `root`."""
    return [step for step in _named_steps(Path(root)) if is_committed(Path(root, str(step)))]


def latest_step(root: os.PathLike[str] | str) -> int | None:
    """Returns the greatest step that is committed in `root`."""
    candidates = reversed(_named_steps(Path(root)))
    return next((step for step in candidates if is_committed(Path(root, str(step)))), None)


def leftovers(root: os.PathLike[str] | str) -> list[Path]:
    """Returns what is in progress or in the trash in `root`, sorted by name.

    A live writer's work is among it: whoever sweeps must know that there is none.
    """
    return sorted(
        Path(root, name)
        for name in _list_names(Path(root))
        if name.startswith(TRASH_PREFIX) or _IN_PROGRESS_NAME.fullmatch(name)
    )


def is_committed(checkpoint: Path) -> bool:
    """Returns whether the directory holds the commit markers and a whole manifest; the arrays are not looked at."""
    metadata, manifest = (checkpoint / marker for marker in COMMIT_MARKERS)
    return metadata.is_file() and _is_whole_manifest(manifest)


def _named_steps(root: Path) -> list[int]:
    return sorted(int(name) for name in _list_names(root) if _STEP_NAME.fullmatch(name))


def _list_names(root: Path) -> list[str]:
    try:
        return os.listdir(root)
    except FileNotFoundError:
        return []


def _is_whole_manifest(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            header = file.read(len(_MANIFEST_MAGIC) + _MANIFEST_LENGTH.size)
            size_bytes = os.fstat(file.fileno()).st_size
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    magic, length = header[:4], header[4:]
    if magic != _MANIFEST_MAGIC or len(length) != _MANIFEST_LENGTH.size:
        return False
    return bool(_MANIFEST_LENGTH.unpack(length)[0] == size_bytes)
