"""Engines that nobody else closes: those whose owner is gone, all of them at exit, none of them after a fork."""

from __future__ import annotations

import atexit
import os
import sys
import time
import weakref
from collections import deque
from functools import cache
from typing import Protocol

from offstep import _native
from offstep.errors import SaveFailed


class Unfinished(Protocol):
    """An engine that is open, or has failures that nobody has been told of."""

    def close(self) -> None:
        """Waits for all saves, then gives slots and writer back."""

    def close_if_idle(self) -> bool:
        """Closes it unless a save is pending; never waits for one; returns whether it is closed."""

    def finish(self, within_seconds: float) -> bool:
        """Closes it if its saves are done within the time, or within its `exit_seconds`; returns whether it did."""

    @property
    def exit_seconds(self) -> float:
        """How long the end of the process waits for the saves."""

    def describe_unfinished(self) -> str:
        """Says what becomes of the saves that are still pending when nobody waits for them any longer."""

    def take_failures(self) -> list[SaveFailed]:
        """Returns the failures that nobody has been told of, and forgets them."""

    def forget_after_fork(self) -> None:
        """In a forked child: gives up what is the parent's."""


_unfinished: dict[Unfinished, None] = {}  # a dict, so that they keep their order
_is_over = False
_SILENT_SECONDS = 5.0  # a wait at exit longer than this is explained

_abandoned: deque[Unfinished] = deque()  # their owners are gone, by an exception in `fit` or a forgotten `close`


def add(engine: Unfinished) -> None:
    """Has the engine closed at exit, unless `remove` comes before."""
    _register_exit()
    _unfinished[engine] = None


def remove(engine: Unfinished) -> None:
    """Forgets an engine that is closed and has nothing left to tell."""
    _unfinished.pop(engine, None)


def tie(engine: Unfinished, owner: object) -> weakref.finalize[..., object]:
    """Has the engine closed by `close_abandoned` once its owner is gone; `detach()` of the result takes it back."""
    # A finalizer may run on any thread at any moment: it must neither wait nor free anything.
    finalizer = weakref.finalize(owner, _abandoned.append, engine)
    finalizer.atexit = False
    return finalizer


def close_abandoned() -> None:
    """Closes the engines whose owners are gone and whose saves are done; the others stay for a later call."""
    for _ in range(len(_abandoned)):
        try:
            engine = _abandoned.popleft()
        except IndexError:  # another thread was faster
            return
        if not engine.close_if_idle():
            _abandoned.append(engine)


@cache
def _register_exit() -> None:
    # Not at import: whoever uses an engine has imported JAX, whose own handler has to run after this one.
    atexit.register(_finish_at_exit)


def check_is_running() -> None:
    """Raises a `RuntimeError` when the process has waited for its saves already, so that nobody would for another."""
    if _is_over:
        raise RuntimeError("a checkpoint cannot be saved any more: the interpreter is shutting down")


def _finish_at_exit() -> None:
    """Waits for all that was submitted; failures that nobody has been told of are printed and fail the exit."""
    global _is_over  # noqa: PLW0603
    _is_over = True
    problems: list[str] = []
    engines = list(_unfinished)
    try:
        late = _finish(engines)
    except KeyboardInterrupt:
        late = [f"interrupted at exit; {text}" for engine in engines if (text := engine.describe_unfinished())]
    problems += late
    problems += [str(failure) for engine in engines for failure in engine.take_failures()]
    for problem in problems:
        print(f"offstep: {problem}", file=sys.stderr)
    if problems:
        _native.fail_exit()


def _finish(engines: list[Unfinished]) -> list[str]:
    """Closes the engines, and says of which the time ran out."""
    started = time.monotonic()
    quick = [engine for engine in engines if engine.finish(_SILENT_SECONDS)]
    slow = [engine for engine in engines if engine not in quick]
    if slow:
        print("offstep: waiting for saves to become durable; Ctrl-C ends the waiting", file=sys.stderr)
    late = [engine for engine in slow if not engine.finish(engine.exit_seconds - (time.monotonic() - started))]
    return [f"not durable after {engine.exit_seconds} s at exit; {engine.describe_unfinished()}" for engine in late]


def _forget_after_fork() -> None:
    for engine in _unfinished:
        engine.forget_after_fork()
    _unfinished.clear()
    _abandoned.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
