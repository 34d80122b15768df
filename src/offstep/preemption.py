"""Notes SIGTERM, so that those who train can save first; then whoever would have had the signal gets it.

One handler for the whole process, which is installed while somebody watches. Main thread only, but for `is_due`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

_watching: weakref.WeakSet[Preemption] = weakref.WeakSet()
_earlier: Any = None  # the handler that ours replaced, as `signal.signal` returned it
_deadline: threading.Timer | None = None  # running since the signal came


class Preemption:
    """What one callback does about SIGTERM: it watches while it trains, and hands over once it has saved.

    The signal goes on to the earlier handler when all who watch have handed over, when it comes a second time, when
    nobody who watches is training any longer, and in any case after `within_seconds`.

    Args:
        within_seconds: How long after the signal the earlier handler has to get it.
    """

    def __init__(self, within_seconds: float) -> None:
        if not isinstance(within_seconds, (int, float)) or not 0 < within_seconds < threading.TIMEOUT_MAX:
            raise ValueError(f"preemption_seconds must be a positive number. Received: {within_seconds!r}")
        self._within_seconds = within_seconds
        self._is_training: Callable[[], Callable[[], bool] | None] = lambda: None
        self._due_at: float | None = None  # time.monotonic(), from the signal on

    def __reduce__(self) -> tuple[type, tuple[float]]:
        return type(self), (self._within_seconds,)  # a copy watches for itself

    @property
    def is_due(self) -> bool:
        """Whether the signal has come."""
        return self._due_at is not None

    @property
    def within_seconds(self) -> float:
        """How long after the signal the earlier handler has to get it."""
        return self._within_seconds

    @property
    def remaining_seconds(self) -> float:
        """How much time is left of what there was when the signal came."""
        return self._within_seconds if self._due_at is None else max(0.0, self._due_at - time.monotonic())

    def watch(self, is_training: Callable[[], bool]) -> None:
        """Begins to watch; a second time does nothing.

        Args:
            is_training: A method, asked when the signal comes: whether there will be another batch to save after.
        """
        if threading.current_thread() is not threading.main_thread():
            _refuse("training does not run on the main thread")
        elif signal.getsignal(signal.SIGTERM) is None:
            _refuse("SIGTERM has a handler that Python did not install")
        else:
            self._is_training = weakref.WeakMethod(is_training)
            self._due_at = None
            _watching.add(self)
            _install()

    def stop_watching(self) -> None:
        """Ends the watching; a signal that has come and is not handed over counts as handed over."""
        _watching.discard(self)
        if self.is_due:
            self.hand_over()
        elif not _watching:
            _uninstall()

    def hand_over(self) -> None:
        """Says that the save is done, or has failed.

        When nobody else has one to make, the signal goes on: mostly, this process ends in here.
        """
        self._due_at = None
        if not any(other.is_due for other in list(_watching)):
            _pass_on()

    def note(self) -> bool:
        """Takes the signal; returns whether there will be a save."""
        is_training = self._is_training()
        if is_training is None or not is_training():
            return False
        self._due_at = time.monotonic() + self._within_seconds
        return True


def _refuse(reason: str) -> None:
    warnings.warn(f"save_on_preemption does nothing here: {reason}.", RuntimeWarning, stacklevel=4)


def _is_installed() -> bool:
    return signal.getsignal(signal.SIGTERM) is _note


def _install() -> None:
    global _earlier  # noqa: PLW0603  the process has one handler
    if not _is_installed():
        _earlier = signal.signal(signal.SIGTERM, _note)


def _uninstall() -> None:
    global _deadline  # noqa: PLW0603
    if _deadline is not None:
        _deadline.cancel()
        _deadline = None
    if _is_installed():
        signal.signal(signal.SIGTERM, _earlier)


def _note(*_: object) -> None:
    """Handles SIGTERM."""
    global _deadline  # noqa: PLW0603
    savers = [watcher for watcher in list(_watching) if watcher.note()] if _deadline is None else []
    if not savers:
        _watching.clear()
        _pass_on()
        return
    seconds = min(saver.remaining_seconds for saver in savers)
    _deadline = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    _deadline.name, _deadline.daemon = "offstep-preemption", True
    _deadline.start()


def _pass_on() -> None:
    is_ours = _is_installed()
    _uninstall()
    sys.stdout.flush()  # the default is to end at once
    sys.stderr.flush()
    if is_ours:
        signal.raise_signal(signal.SIGTERM)
    elif callable(_earlier):  # somebody has a handler before ours, which has called it
        _earlier(signal.SIGTERM, None)
    elif _earlier == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    if _watching:  # it was ignored, or only noted
        _install()


def _forget_after_fork() -> None:
    # A data loader's worker is told to end by SIGTERM: it has no batch to wait for.
    global _deadline  # noqa: PLW0603
    _deadline = None
    _watching.clear()
    _uninstall()


os.register_at_fork(after_in_child=_forget_after_fork)
