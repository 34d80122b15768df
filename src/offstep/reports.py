"""What became of the saves of one engine, and what the training thread has not been told of yet."""

from __future__ import annotations

import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any

from offstep.errors import SaveFailed, SaveReplaced, SaveTimeout, WriterDied
from offstep.options import OnError
from offstep.pending import PendingSave
from offstep.records import SaveStats

Outcome = dict[str, Any]  # JSON: what the writer says of a job

_KEPT_STATS = 100_000
_COSTS = ("cpu_seconds", "written_bytes", "write_seconds", "retire_seconds")


@dataclass
class Counts:
    """How many saves there were; `uploaded` are those copied from the first of two tiers into the second."""

    requested: int = 0
    durable: int = 0
    failed: int = 0
    skipped: int = 0
    uploaded: int = 0


class Reports:
    """Keeps count of the saves of one engine, and the failures that nobody has been told of.

    One thread adds saves; any may settle them or ask.
    """

    def __init__(self, on_error: OnError) -> None:
        self.counts = Counts()
        self._on_error = on_error
        self._pending: dict[int, PendingSave] = {}  # by job number
        self._uploads: dict[int, str] = {}  # by job number
        self._failures: deque[SaveFailed] = deque()
        self._remarks: deque[Warning] = deque()  # what is no failure
        self._recent: deque[PendingSave] = deque(maxlen=_KEPT_STATS)
        self._newest: PendingSave | None = None  # of the durable ones

    @property
    def stats(self) -> list[SaveStats]:
        """What each of the last 100,000 saves cost, oldest first."""
        return [pending.stats for pending in self._recent]

    @property
    def pending(self) -> list[PendingSave]:
        """The saves that are neither durable nor failed, oldest first."""
        return list(self._pending.values())

    @property
    def pending_numbers(self) -> list[int]:
        """Their job numbers."""
        return list(self._pending)

    @property
    def uploading(self) -> list[str]:
        """Where in a store copies are still to be made, oldest first."""
        return list(self._uploads.values())

    def expect_upload(self, number: int, address: str) -> None:
        """Adds a copy into a store whose outcome will come."""
        self._uploads[number] = address

    def take_in_upload(self, number: int, step: int, outcome: Outcome) -> None:
        """Notes the outcome of a copy into a store; one that a newer copy took the place of is none that failed."""
        address = self._uploads.pop(number)
        if "withdrawn" in outcome:
            return
        if "error" in outcome:
            text = f"step {step} is durable, but was not copied to {address}: {outcome['error']}"
            code = outcome.get("errno")
            self._failures.append(SaveFailed(text) if code is None else SaveFailed(code, text))
            return
        self.counts.uploaded += 1
        self._remarks += map(RuntimeWarning, outcome.get("remarks", ()))

    @property
    def has_untold(self) -> bool:
        """Whether there is a failure that nobody has been told of."""
        return bool(self._failures)

    def expect(self, number: int, pending: PendingSave) -> None:
        """Adds a save whose outcome will come."""
        self._pending[number] = pending

    def call_off(self, number: int) -> None:
        """Takes back `expect`: it was never handed over."""
        del self._pending[number]

    def keep(self, pending: PendingSave) -> None:
        """Adds a save to the stats."""
        self._recent.append(pending)

    def take_in(self, number: int, outcome: Outcome, started: float) -> SaveFailed | None:
        """Notes the outcome of a save that began at `started` (`time.monotonic()`), and returns its failure."""
        pending = self._pending.pop(number)
        if "withdrawn" in outcome:
            self.skip(pending)
            return SaveReplaced(f"step {pending.step} was not saved to {pending.path}: a newer snapshot took its place")
        if "error" in outcome:
            pending.change(error=outcome["error"])
            self.counts.failed += 1
            failure = _failure(pending, outcome)
            self._failures.append(failure)
            return failure
        costs = {name: outcome[name] for name in _COSTS} | {"retired": tuple(outcome["retired"])}
        pending.change(durable_seconds=outcome["durable_at"] - started, **costs)
        self.counts.durable += 1
        if self._newest is None or pending.step >= self._newest.step:
            self._newest = pending
        self._remarks += map(RuntimeWarning, outcome.get("remarks", ()))
        return None

    def skip(self, pending: PendingSave) -> None:
        """Notes that a save is not written because all slots are on their way; the first time it is said."""
        pending.change(skipped=True)
        self.counts.skipped += 1
        if self.counts.skipped == 1:
            text = (
                "A save was skipped: all slots are on their way to the disk. This is said once; `counts.skipped` says "
                "how many, and `stats` which."
            )
            self._remarks.append(UserWarning(text))

    def remark(self, text: str) -> None:
        """Has something said that is no failure."""
        self._remarks.append(RuntimeWarning(text))

    def pass_on(self) -> None:
        """Tells of what has failed, as `on_error` says.

        Raises:
            SaveFailed: a save failed; each failure is raised once.
        """
        while self._remarks:
            warnings.warn(self._remarks.popleft(), stacklevel=4)
        while self._failures:
            failure = self._failures.popleft()
            if self._on_error == "raise":
                raise failure
            warnings.warn(str(failure), RuntimeWarning, stacklevel=4)

    def describe_timeout(self, timeout: float | None, waited_for: PendingSave | None = None) -> SaveTimeout:
        """Returns the error of a wait for one save, or for all, that ran out."""
        steps = tuple(pending.step for pending in (self.pending if waited_for is None else [waited_for]))
        names = ", ".join(map(str, steps))
        newest = self._newest
        durable = "none of this run is" if newest is None else f"the newest that is: step {newest.step}, {newest.path}"
        subject = f"step {names} is" if len(steps) == 1 else f"steps {names} are"
        return SaveTimeout(
            f"{subject} not durable after {timeout} s; {durable}", steps, None if newest is None else newest.step
        )

    def take_failures(self) -> list[SaveFailed]:
        """Returns the failures that nobody has been told of, and forgets them."""
        failures = list(self._failures)
        self._failures.clear()
        return failures

    def forget_failure(self, error: SaveFailed) -> None:
        """Takes a failure off the list, because the caller is about to raise it."""
        if error in self._failures:
            self._failures.remove(error)

    def forget_pending(self) -> None:
        """In a forked child: what is on its way, and has failed, is the parent's."""
        for pending in self._pending.values():
            pending.disown()
        self._pending.clear()
        self._uploads.clear()
        self._failures.clear()


def _failure(pending: PendingSave, outcome: Outcome) -> SaveFailed:
    text = (
        f"step {pending.step} was not saved to {pending.path}: {outcome['error']}; "
        "checkpoints saved before it are untouched"
    )
    if outcome.get("died"):
        return WriterDied(text)
    if outcome.get("errno") is not None:
        return SaveFailed(outcome["errno"], text)
    return SaveFailed(text)
