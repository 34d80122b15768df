"""What makes the finished checkpoint of a peer that never fsyncs durable?"""

from __future__ import annotations

import os
from pathlib import Path


def fsync_tree(path: Path) -> None:
    """Makes a finished checkpoint durable: every file and directory of it, and the directory that holds it."""
    entries = [*path.rglob("*"), path, path.parent] if path.is_dir() else [path, path.parent]
    for entry in entries:
        try:
            descriptor = os.open(entry, os.O_RDONLY)
        except FileNotFoundError:  # Retention was faster.
            continue
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
