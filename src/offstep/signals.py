"""Holds signals back while a snapshot changes hands: half of that would lose it, or tear it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)

Handlers = dict[signal.Signals, Any]  # as `signal.getsignal` returns them


@contextmanager
def held_signals() -> Iterator[None]:
    """Runs the handlers of signals that arrive within the block at its end. They may raise, as Ctrl-C does.

    Blocks are to be short. On other threads than the main one no handler ever runs, so there is nothing to hold.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: dict[int, None] = {}
    handlers = {number: handler for number in _HELD if callable(handler := signal.getsignal(number))}
    replaced: Handlers = {}
    try:
        for number, handler in handlers.items():
            replaced[number] = handler
            signal.signal(number, lambda number, _: arrived.setdefault(number))
        yield
    finally:
        _restore(replaced)
        for arrival in arrived:
            signal.raise_signal(arrival)


def _restore(handlers: Handlers) -> None:
    """Puts the handlers back, all of them: one that is back may run, and raise, before the next one is."""
    try:
        while handlers:
            number, handler = next(iter(handlers.items()))
            signal.signal(number, handler)
            del handlers[number]
    finally:
        if handlers:
            _restore(handlers)
