"""Tries again what failed for a reason that may pass: a full disk that somebody clears, a quota, an interruption."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

TRANSIENT = frozenset({errno.EINTR, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT})
"""What may pass. Not EIO: an fsync that failed once may succeed the next time with the data lost."""

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0


Result = TypeVar("Result")


def retry(
    attempt: Callable[[], Result],
    within_seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Result, str | None]:
    """Calls `attempt` until it succeeds; returns its result, and a remark if that took more than one call.

    Args:
        attempt: Starts from nothing each time, and leaves nothing behind when it fails.
        within_seconds: How long after its first failure it may begin again.
        clock: Seconds that pass.
        sleep: Waits for some of them.

    Raises:
        OSError: the last one, with a note when there were several: it cannot pass, or the time is over.
    """
    tries, pause = 0, _FIRST_PAUSE_SECONDS
    began = ended = clock()
    cause = ""
    while True:
        tries += 1
        try:
            result = attempt()
        except OSError as error:
            began, ended = began if tries > 1 else clock(), clock()
            remaining = began + within_seconds - ended
            if error.errno not in TRANSIENT or remaining <= 0:
                if tries > 1:
                    error.add_note(f"tried {tries} times in {ended - began:.1f} s")
                raise
            cause = str(error)
            sleep(min(pause, remaining))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        else:
            return result, f"it took {tries} tries and {clock() - began:.1f} s: {cause}" if cause else None
