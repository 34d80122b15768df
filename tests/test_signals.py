"""Signals that arrive while a snapshot changes hands."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from orbax.checkpoint import v1
from processes import count_slots

from offstep.checkpointer import Checkpointer
from offstep.signals import held_signals


class Interrupted(Exception):
    """By an alarm."""


def interrupt(*_: object) -> None:
    raise Interrupted


@contextmanager
def handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    earlier = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, earlier)


def test_ctrl_c_waits_for_the_end_of_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), held_signals():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        done.append("all of it")
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_does_not_raise_is_called_once_for_each_signal() -> None:
    heard: list[int] = []
    with handled(signal.SIGUSR1, lambda number, _: heard.append(number)):
        with held_signals():
            signal.raise_signal(signal.SIGUSR1)
            assert heard == []
        assert heard == [signal.SIGUSR1]


def test_all_handlers_are_back_when_one_of_them_raises() -> None:
    heard: list[int] = []
    note = lambda number, _: heard.append(number)  # noqa: E731
    with handled(signal.SIGTERM, note), handled(signal.SIGUSR2, interrupt):
        with pytest.raises(Interrupted), held_signals():  # noqa: PT012
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGUSR2)
        assert signal.getsignal(signal.SIGTERM) is note
        assert signal.getsignal(signal.SIGUSR2) is interrupt
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_inner_block_hands_on_to_the_outer_one() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), held_signals():  # noqa: PT012
        with held_signals():
            signal.raise_signal(signal.SIGINT)
        reached.append("behind the inner block")
    assert reached


def test_an_error_of_the_block_is_not_lost() -> None:
    with pytest.raises(ZeroDivisionError), held_signals():
        raise ZeroDivisionError


def test_another_thread_holds_nothing() -> None:
    seen: list[Any] = []

    def look() -> None:
        with held_signals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


@pytest.fixture
def without_collections() -> Iterator[None]:
    """Python swallows what is raised within a collection, and JAX has callbacks there."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.crash
@pytest.mark.parametrize("in_process", [False, True])
def test_saves_that_are_interrupted_at_any_moment_leave_no_slot_and_no_torn_checkpoint(
    tmp_path: Path, in_process: bool, without_collections: None
) -> None:
    random = np.random.default_rng(3)
    state = {"w": np.zeros(100_000), "b": np.zeros(3)}
    interrupted = 0
    checkpointer = Checkpointer(tmp_path, in_process=in_process, max_to_keep=20)
    checkpointer.save(0, state)
    with handled(signal.SIGALRM, interrupt):
        for step in range(1, 201):
            for leaf in state.values():
                leaf[:] = step
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 3e-3))
                    checkpointer.save(step, state)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                interrupted += 1
    checkpointer.close()
    assert interrupted > 20
    assert count_slots() == 0
    counts = checkpointer.counts
    assert counts.failed == counts.skipped == 0
    assert counts.durable == len(checkpointer.stats) > 1
    steps = checkpointer.all_steps()
    assert len(steps) == min(20, counts.durable)
    for step in steps:
        restored = v1.load(tmp_path / str(step), checkpointable_name="pytree")
        assert (np.asarray(restored["w"]) == step).all()
        assert (np.asarray(restored["b"]) == step).all()
