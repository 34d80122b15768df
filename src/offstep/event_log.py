"""The log of what a run did: one JSON object a line, appended while it trains."""

from __future__ import annotations

import errno
import json
import os
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

NAME = "offstep-events.jsonl"
"""The name that the documentation gives it, and that is looked for in a directory."""

VERSION = 1
"""Of the lines; each `begin` carries it."""

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


class EventLog:
    """Appends events to a file, which it keeps open from the first to `close`.

    A line takes some microseconds: it is handed to the system at once, so that it outlives a kill, and never fsynced.

    Args:
        path: The file; its directory is made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._closing: weakref.finalize[..., object] | None = None
        self._descriptor = -1
        self._has_failed = False

    def add(self, event: str, **about: Any) -> None:  # JSON
        """Appends an event. When that fails, a warning says so, and nothing more is logged."""
        if self._has_failed:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 6)} | about) + "\n"
        try:
            self._write(line.encode())
        except OSError as error:
            # A log is not worth a training; that it ends here is said.
            self._has_failed = True
            self.close()
            warnings.warn(f"{self._path}: no more events are logged: {error}", RuntimeWarning, stacklevel=4)

    def close(self) -> None:
        """Closes the file; the next event opens it again."""
        if self._closing is not None:
            self._closing()
            self._closing = None

    def _write(self, line: bytes) -> None:
        if self._closing is None:
            self._open()
        if os.write(self._descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, _FLAGS, 0o666)
        self._closing = weakref.finalize(self, os.close, self._descriptor)  # a fit may end in an exception
        size_bytes = os.fstat(self._descriptor).st_size
        if size_bytes and os.pread(self._descriptor, 1, size_bytes - 1) != b"\n":
            os.write(self._descriptor, b"\n")  # a run that was killed has left half a line
