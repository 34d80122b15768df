"""Where several training processes save when one of them is told to end: at the next hook that all can still reach.

The processes go through the same hooks in the same order, so a number names one. Who has got the signal puts a notice
into the key-value store. Then a thread of each process stops the training at its next hook and tells the number of the
last one. The hook after the greatest of these is still before all of them, and there they meet. So training
stops for two messages, once, and only because the signal has come.
"""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import suppress

from offstep.coordination import Group, ProcessMissing, ServiceLost

_NOTICE, _END = "signal", "end"
_FOREVER_SECONDS = 3600.0
_END_SECONDS = 10.0
_numbers = itertools.count(1)  # the processes begin the same trainings, in the same order


class Rendezvous:
    """One process's part in the meetings of one training. The training thread calls it.

    Args:
        group: The processes.
        patience_seconds: How long they may take to agree.
    """

    def __init__(self, group: Group, patience_seconds: float) -> None:
        self._group, self._patience_seconds = group, patience_seconds
        self._key = f"offstep/preemption/{next(_numbers)}"
        self._changed = threading.Condition()  # guards everything below
        self._position = 0  # hooks that this process has gone through
        self._meeting = 0  # how many there have been
        self._announced = -1  # the last one that this process has asked for
        self._is_agreeing = self._has_ended = False
        self._place: int | None = None
        self._met_at: float | None = None  # time.monotonic()
        self._trouble = ""
        # A daemon: where training ends by an exception, nobody ends it.
        self._thread = threading.Thread(target=self._take_part, name="offstep-rendezvous", daemon=True)
        self._thread.start()

    @property
    def trouble(self) -> str:
        """Why there will be no meeting any more; mostly empty."""
        return self._trouble

    def is_over(self, within_seconds: float) -> bool:
        """Returns whether they have met in the last seconds: then a signal has nothing to wait for."""
        return self._met_at is not None and time.monotonic() - self._met_at < within_seconds

    def come_by(self, *, announces: bool) -> bool:
        """Counts a hook, and returns whether it is the one where all meet.

        Waits while they agree on one. With `announces` it asks for a meeting.
        """
        if announces:
            self._announce()
        with self._changed:
            self._changed.wait_for(lambda: not self._is_agreeing, 2 * self._patience_seconds)
            self._position += 1
            is_here = self._position == self._place
            if is_here:
                self._met_at = time.monotonic()
                self._changed.notify_all()
            return is_here

    def end(self) -> None:
        """Ends the thread: the training has ended, in this process and so in all."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()
        self._put(_END)
        self._thread.join(_END_SECONDS)

    def _announce(self) -> None:
        with self._changed:
            if self._announced == self._meeting:
                return
            self._announced = self._meeting
        self._put(_NOTICE)

    def _put(self, text: str) -> None:
        # On a thread: to wait for a service that is gone would keep the process from ending.
        key = f"{self._key}/{self._meeting}/notice"
        threading.Thread(target=self._put_or_leave, args=(key, text), name="offstep-notice", daemon=True).start()

    def _put_or_leave(self, key: str, text: str) -> None:
        with suppress(ServiceLost):  # another one has been faster; or there will be no meeting, as the thread hears
            self._group.put(key, text)

    # ---------------------------------------------------------------------------------------------------- the thread

    def _take_part(self) -> None:
        try:
            while self._is_called():
                self._agree_on_place()
        except (ServiceLost, ProcessMissing) as error:
            with self._changed:
                self._trouble, self._is_agreeing = str(error), False
                self._changed.notify_all()

    def _is_called(self) -> bool:
        """Waits for the next meeting; returns false at the end of the training."""
        notice: str | None = None
        while notice is None and not self._has_ended:
            notice = self._group.get(f"{self._key}/{self._meeting}/notice", _FOREVER_SECONDS)
        return notice == _NOTICE and not self._has_ended

    def _agree_on_place(self) -> None:
        with self._changed:
            self._is_agreeing = True
            position = self._position
        key = f"{self._key}/{self._meeting}"
        place = self._group.agree(key, position, lambda said: max(said) + 1, self._patience_seconds)
        with self._changed:
            self._place, self._is_agreeing = place, False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._has_ended or self._position >= place)
            self._meeting += 1
