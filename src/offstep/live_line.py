"""A line that says which saves are on their way: below Keras's progress bar in a terminal, beside it in a notebook."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

_SHORTEST_SECONDS = 0.1  # from one change of the text to the next
_ERASE_LINE, _UP = "\x1b[2K", "\x1b[1A"


class _Pace:
    """Lets a text be shown unless one was just before."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = -_SHORTEST_SECONDS

    def is_due(self) -> bool:
        """Returns whether a text may be shown now, which then counts as shown."""
        now = self._clock()
        if now - self._last < _SHORTEST_SECONDS:
            return False
        self._last = now
        return True


class LiveLine:
    """Shows one line, in place of what it showed before. Training thread only.

    Keras draws its bar from the left edge of the line that the cursor is in, and ends it with a line feed. So the
    line below is free until then: `hide` has to come before anything else is printed, and before an epoch ends.

    Args:
        file: The terminal.
        clock: Gives seconds.
    """

    def __init__(self, file: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(file=file, highlight=False, markup=False, emoji=False)
        self._file, self._pace = file, _Pace(clock)
        self._is_shown = False

    def show(self, text: str) -> None:
        """Shows a text, cut to the width of the terminal; too soon after the last one it is left out."""
        if not self._pace.is_due():
            return
        self._is_shown = True
        line = Text(text, style="dim")
        line.truncate(self._console.width - 1, overflow="ellipsis")
        with self._console.capture() as capture:
            self._console.print(line, end="")
        self._write(f"\n{_ERASE_LINE}{capture.get()}{_UP}\r")

    def hide(self) -> None:
        """Takes the line away."""
        if self._is_shown:
            self._is_shown = False
            self._write(f"\n{_ERASE_LINE}{_UP}\r")

    def _write(self, text: str) -> None:
        self._file.write(text)  # at once: Keras draws its bar on another thread
        self._file.flush()


class NotebookLine:
    """The same in a notebook, as an output of its own, empty at first.

    Open it before Keras draws its bar: what is printed after another output is a new one, where no bar can be redrawn.

    Args:
        display: The module `IPython.display`.
        clock: Gives seconds.
    """

    def __init__(self, display: Any, clock: Callable[[], float] = time.monotonic) -> None:  # IPython may be missing
        self._pace = _Pace(clock)
        self._is_shown = False
        self._handle = display.display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, text: str) -> None:
        """Shows a text; too soon after the last one it is left out."""
        if not self._pace.is_due():
            return
        self._is_shown = True
        self._handle.update({"text/plain": text}, raw=True)

    def hide(self) -> None:
        """Empties the output, which stays where it is for the next text."""
        if self._is_shown:
            self._is_shown = False
            self._handle.update({"text/plain": ""}, raw=True)


def open_line() -> LiveLine | NotebookLine | None:
    """Returns a line where somebody looks on: in a notebook, or a terminal that can move its cursor; else `None`."""
    if "ipykernel" in sys.modules:  # as Keras tells it
        return NotebookLine(import_module("IPython.display"))
    console = Console(file=sys.stdout)
    return LiveLine(sys.stdout) if console.is_terminal and not console.is_dumb_terminal else None
