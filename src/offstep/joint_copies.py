"""Copies of durable steps from disks of the training processes' own into a store, on a thread beside training.

In the store it is one step that all make together, as if they had saved it there: each copies its share, and the
primary commits. One copy is made at a time, and of those that wait the newest only, which the primary decides.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import replace
from functools import partial

from offstep.coordination import PRIMARY, Group, ServiceLost
from offstep.handover import Outcome
from offstep.joint_decisions import JointDecisions
from offstep.joint_jobs import JointJobs
from offstep.joint_save import Failure, JointSave, Upload, describe
from offstep.writer import Writer

_GO, _NO = "go", "no"


class JointCopies:
    """Makes the copies of one engine together with those of the other processes, in the order of the steps.

    Args:
        group: The processes.
        writer: This process's.
        jobs: Those that it has.
        changed: Guards what is in here; notified after each copy.
        digest: Tells whether all have the same structure.
        share_plan: Number of the plan of this process's share.
        merged_plan: Number of the plan of `orbax_merged`; the primary's.
        commit_seconds: How long a copy may take until all have reported their shares.
    """

    def __init__(
        self,
        group: Group,
        writer: Writer,
        jobs: JointJobs,
        changed: threading.Condition,
        *,
        digest: str,
        share_plan: int,
        merged_plan: int | None,
        commit_seconds: float,
    ) -> None:
        self._group, self._jobs, self._share_plan = group, jobs, share_plan
        self._commit_seconds, self._changed = commit_seconds, changed
        self._decisions = JointDecisions(
            group,
            writer,
            jobs,
            changed,
            digest=digest,
            merged_plan=merged_plan,
            is_local=False,
            commit_seconds=commit_seconds,
        )
        self._copies: deque[JointSave] = deque()  # guarded by self._changed, as what follows
        self._current: JointSave | None = None  # the first of them once its turn has come, or is waited for
        self._is_closed = False
        # A daemon, because `close` at exit waits for its work before it ends it.
        self._thread = threading.Thread(target=self._copy_all, name="offstep-copies", daemon=True)
        self._thread.start()

    @property
    def sources(self) -> tuple[str, ...]:
        """The directories that are being copied, or wait for it: they must stay."""
        with self._changed:
            return tuple(copy.job.source for copy in self._copies)

    def add(self, key: str, upload: Upload) -> None:
        """Has a step copied. All processes add those that are durable in all, in the same order.

        Args:
            key: Of its save.
            upload: The copy.
        """
        key = key.replace("/", "/copy/", 1)  # none of the keys that are deleted with those of the save
        job = replace(upload.job, format="orbax_share_copy", plan=self._share_plan, key=key)
        copy = JointSave(job, {}, _nothing, _nothing, upload.on_outcome, None, 0.0, key)
        with self._changed:
            waiting = [older for older in self._copies if older is not self._current]
            self._copies.append(copy)
            if self._is_primary:  # else its thread might come to one of them meanwhile
                self._drop(waiting)
            self._changed.notify_all()
        for older in waiting:
            self._leave_out(older)

    def close(self) -> None:
        """Ends the thread; all copies have their outcomes."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def end(self) -> None:
        """Nothing is handed to the writer from now on; until then what was written too late is discarded."""
        self._decisions.end()

    def _copy_all(self) -> None:
        while (copy := self._wait_for_copy()) is not None:
            try:
                outcome = self._make(copy)
            except Exception as error:  # noqa: BLE001  whatever it is, the training thread must hear of it
                outcome = describe(error)
            with self._changed:
                copy.is_settled = True
                self._copies.popleft()
                self._current = None
                is_written = copy.written is not None
            if is_written:
                self._decisions.discard(copy)
            self._settle(copy, outcome)

    def _wait_for_copy(self) -> JointSave | None:
        """Returns the oldest that is not made; `None` once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or bool(self._copies))
            self._current = self._copies[0] if self._copies else None
            return self._current

    def _make(self, copy: JointSave) -> Outcome:
        if not self._is_chosen(copy):
            return {"withdrawn": True}
        copy.deadline = time.monotonic() + self._commit_seconds
        # What is older goes when this one is committed; what comes too late nobody wants.
        share = replace(copy.job, keep=None, until=copy.deadline)
        self._jobs.hand_over(share, partial(self._note_written, copy))
        merged = self._decisions.decide(copy, lambda: ())
        assert copy.written is not None
        return merged or copy.written

    def _is_chosen(self, copy: JointSave) -> bool:
        """Returns whether the copy is made, and not left out for a newer one, as the primary says."""
        key = _turn_key(copy)
        if self._is_primary:
            self._group.put(key, _GO)
            return True
        answer = self._group.get(key, self._commit_seconds + self._decisions.grace_seconds)
        if answer is None:
            raise Failure(f"process {PRIMARY} has not begun to copy it within {self._commit_seconds:g} s")
        return answer == _GO

    def _leave_out(self, copy: JointSave) -> None:
        """Gives up a copy that waits while a newer one has come: the primary tells, the others look whether it has.

        What it has durable all have, and will come to. What it has not told yet stays for the next time, or its turn.
        """
        try:
            if self._is_primary:
                self._group.put(_turn_key(copy), _NO)
                self._decisions.forget_later(copy)
            elif self._group.peek(_turn_key(copy)) != _NO:
                return
        except ServiceLost:  # the copies that follow say so
            if not self._is_primary:
                return
        with self._changed:
            is_left_out = self._is_primary or self._drop([copy])
        if is_left_out:
            self._settle(copy, {"withdrawn": True})

    def _drop(self, copies: list[JointSave]) -> bool:
        """Takes those off the list that still wait, and returns whether any did; with `_changed` held."""
        dropped = [copy for copy in copies if copy in self._copies and copy is not self._current]
        for copy in dropped:
            self._copies.remove(copy)
        return bool(dropped)

    def _settle(self, copy: JointSave, outcome: Outcome) -> None:
        copy.on_outcome(outcome)
        with self._changed:
            self._changed.notify_all()

    @property
    def _is_primary(self) -> bool:
        return self._group.index == PRIMARY

    def _note_written(self, copy: JointSave, outcome: Outcome) -> None:
        with self._changed:
            copy.written = outcome
            is_late = copy.is_settled
        if is_late:
            self._decisions.discard(copy)


def _turn_key(copy: JointSave) -> str:
    return f"{copy.key}/turn"


def _nothing() -> None:
    """Takes the place of what is called when the slot of a save is free: a copy needs none."""
