"""The process that a writer runs in: how it is started, and when it is believed to be a writer.

A program that never says hello is no writer: `sys.executable` may be a launcher, or an application that embeds Python.
"""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import time
from pathlib import Path

HELLO_SECONDS = 60.0
"""How long a started process may take until it says hello; a cold start from a network file system takes some."""

_LAST_BREATH_SECONDS = 1.0
_START = "import sys; sys.path[:] = {path!r}; from {entry} import main; main()"

entry = "offstep.worker"
"""The module whose `main` a writer process runs. Tests have one of their own, whose disk fails."""


class WriterProcess:
    """A process that was started to be a writer.

    Args:
        theirs: Its end of the pipe; closed here once it has it.

    Attributes:
        is_greeted: Whether it has said hello.

    Raises:
        OSError: it cannot be started; the text says why.
    """

    def __init__(self, theirs: socket.socket) -> None:
        if not sys.executable:
            raise OSError("the path of the Python interpreter is not known")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(path=_search_path(), entry=entry), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # so that Ctrl-C does not reach it
        )
        theirs.close()
        self._launched_at = time.monotonic()
        self.is_greeted = False

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def patience_seconds(self) -> float:
        """Returns how much longer to wait for a sign of life."""
        return math.inf if self.is_greeted else max(0.0, self._launched_at + HELLO_SECONDS - time.monotonic())

    def wait(self) -> int | None:
        """Waits for its end, once the pipe is closed; returns the status of a process that ended by itself."""
        try:
            return self._process.wait(None if self.is_greeted else _LAST_BREATH_SECONDS)
        except subprocess.TimeoutExpired:  # no writer: it does not know that it should end when the pipe closes
            self._process.kill()
            self._process.wait()
            return None


def describe_false_start(status: int | None) -> str:
    """Returns what a program did that never said hello; `status` is that of its `wait`."""
    what = "runs, but not as a writer" if status is None else f"ended at once, with status {status}"
    return f"{sys.executable} {what}"


def _search_path() -> list[str]:
    """Returns `sys.path`, so that the writer finds this very package, though another copy may come first there."""
    ours = Path(__file__).parents[1]
    first = next((Path(path or ".") for path in sys.path if Path(path or ".", "offstep").is_dir()), ours)
    return sys.path if first.absolute() == ours.absolute() else [str(ours), *sys.path]
