"""What is tried again, how often and how long, by a clock that only passes when somebody sleeps."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from offstep.retry import TRANSIENT, retry


class Clock:
    """Passes by what is slept."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds


def fail_with(*numbers: int) -> Callable[[], str]:
    """Fails with these errors one after another, then succeeds."""
    left = list(numbers)

    def attempt() -> str:
        if left:
            number = left.pop(0)
            raise OSError(number, os.strerror(number))
        return "done"

    return attempt


def run(attempt: Callable[[], str], within_seconds: float) -> tuple[str | None, Clock]:
    clock = Clock()
    result, remark = retry(attempt, within_seconds, clock=clock.now, sleep=clock.sleep)
    assert result == "done"
    return remark, clock


def test_what_succeeds_at_once_is_not_worth_a_remark() -> None:
    remark, clock = run(fail_with(), 30)
    assert remark is None
    assert clock.slept == []


@pytest.mark.parametrize("number", sorted(TRANSIENT), ids=errno.errorcode.__getitem__)
def test_what_may_pass_is_tried_again_and_said(number: int) -> None:
    remark, clock = run(fail_with(number, number, number), 30)
    assert remark == f"it took 4 tries and 0.7 s: [Errno {number}] {os.strerror(number)}"
    assert clock.slept == pytest.approx([0.1, 0.2, 0.4])


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.EACCES, errno.ENOENT, errno.EROFS], ids=errno.errorcode.__getitem__
)
def test_what_cannot_pass_is_final(number: int) -> None:
    clock = Clock()
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        retry(fail_with(number), 30, clock=clock.now, sleep=clock.sleep)
    assert raised.value.errno == number
    assert clock.slept == []
    assert not hasattr(raised.value, "__notes__")


def test_what_cannot_pass_is_final_also_after_what_may() -> None:
    clock = Clock()
    with pytest.raises(OSError, match="Input/output error") as raised:
        retry(fail_with(errno.ENOSPC, errno.EIO), 30, clock=clock.now, sleep=clock.sleep)
    assert raised.value.__notes__ == ["tried 2 times in 0.1 s"]


@pytest.mark.parametrize(("seconds", "tries"), [(0, 1), (0.25, 3), (30, 20)])
def test_the_time_is_limited_and_used_up(seconds: float, tries: int) -> None:
    clock, calls = Clock(), []

    def attempt() -> None:
        calls.append(clock.seconds)
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        retry(attempt, seconds, clock=clock.now, sleep=clock.sleep)
    assert len(calls) == tries
    assert calls[-1] == pytest.approx(1000 + seconds)


def test_other_exceptions_go_through() -> None:
    def attempt() -> str:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        run(attempt, 30)
