"""Names of what is no checkpoint: not yet, or not any more. Readers skip them, and what a crash leaves is swept."""

from __future__ import annotations

import os
from pathlib import Path

IN_PROGRESS_MARK = ".orbax-checkpoint-tmp"
"""Orbax's own mark of a directory that is being written; its scanners skip such names."""

OUR_MARK = f"{IN_PROGRESS_MARK}-offstep-"
"""Tells our temporary names from Orbax's own."""

FILE_IN_PROGRESS_PREFIX = ".offstep-tmp-"
"""Begins the name of a single file that is being written: hidden, and without the suffix of its format."""

TRASH_PREFIX = ".offstep-trash-"
"""Begins the name of what is to be deleted."""

REPLACED_PREFIX = ".offstep-replaced-"
"""Begins the name of an older checkpoint while a newer one takes its name, where the two cannot be exchanged."""


def staging_path(final: Path, tag: str) -> Path:
    """Returns where a directory is written before it has its final name."""
    return final.with_name(f"{final.name}{OUR_MARK}{tag}")


def list_staged(final: Path, tag: str) -> list[Path]:
    """Returns what is being written for `final`, or was by writers that died, with the tags `<tag>-<number>`."""
    first = staging_path(final, f"{tag}-").name
    return sorted(final.with_name(name) for name in os.listdir(final.parent) if name.startswith(first))
