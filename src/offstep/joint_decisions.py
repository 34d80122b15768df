"""What becomes of one save of several processes: each reports its share, the primary merges them and tells all.

Whoever is late or missing fails the save, and never makes half a step.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from offstep import commit
from offstep.attachments import Attachment, attach_text
from offstep.coordination import PRIMARY, Group, ServiceLost
from offstep.formats import orbax_merged
from offstep.handover import Outcome
from offstep.joint_jobs import JointJobs
from offstep.joint_save import Failure, JointSave, describe, refuse
from offstep.records import NO_SLOT, Job
from offstep.writer import Writer

_GRACE = 0.1  # how much longer than the primary the others wait for what it decides, as a part of `commit_seconds`
_LEAST_GRACE_SECONDS = 1.0
_SHOWN = 8


class JointDecisions:
    """Decides on saves of one engine together with the other processes, one after another, on the caller's thread.

    Args:
        group: The processes.
        writer: This process's.
        jobs: Those that it has.
        changed: Guards the saves; notified when one has changed.
        digest: Tells whether all have the same structure.
        merged_plan: Number of the plan of `orbax_merged`; the primary's, where all write one directory.
        is_local: Whether each has a disk of its own, and makes a whole directory of what it holds.
        commit_seconds: How long the processes have to report their shares.
    """

    def __init__(
        self,
        group: Group,
        writer: Writer,
        jobs: JointJobs,
        changed: threading.Condition,
        *,
        digest: str,
        merged_plan: int | None,
        is_local: bool,
        commit_seconds: float,
    ) -> None:
        self._group, self._writer, self._jobs, self._changed = group, writer, jobs, changed
        self._digest, self._merged_plan = digest, merged_plan
        self._is_local, self._commit_seconds = is_local, commit_seconds
        # With the time when nobody asks for them any more; guarded by self._changed.
        self._old_keys: deque[tuple[float, str]] = deque()
        self._has_ended = False

    @property
    def grace_seconds(self) -> float:
        """How much longer than the primary the others wait."""
        return max(_LEAST_GRACE_SECONDS, _GRACE * self._commit_seconds)

    def decide(self, save: JointSave, busy: Callable[[], tuple[str, ...]]) -> Outcome | None:
        """Reports this process's share, and returns once all are durable, and merged where they have to be.

        Args:
            save: Whose share the writer has.
            busy: Returns the other targets of saves that are on their way.

        Returns:
            What the primary's writer says of the whole; `None` where this process has made nothing but its share.

        Raises:
            Failure, ServiceLost: there is no checkpoint, or nobody can tell.
        """
        report: dict[str, Any]
        try:
            report = self._await_share(save)
        except Failure as failure:
            report = describe(failure)
        if self._group.index != PRIMARY:
            self._group.put(f"{save.key}/{self._group.index}", json.dumps(report))
            save.is_refused = "error" in report  # the primary never commits without it
            refuse(report)
            self._await_decision(save)
            return None
        try:
            reports = self._gather(save, report)
            merged = None if self._is_local else self._merge(save, reports, busy())
        except Failure as failure:
            save.is_refused = not failure.is_unsure
            self._tell(save, describe(failure))
            raise
        self._tell(save, {})
        return merged

    def have_done(self, save: JointSave, attachments: Mapping[str, Attachment], **changes: Any) -> Outcome:
        """Has the writer do a job without a slot, and waits for it.

        Raises:
            Failure: it has not been done.
        """
        self._jobs.hand_over(self._make_job(save, **changes), partial(self._note_merged, save), attachments)
        with self._changed:
            self._changed.wait_for(lambda: save.merged is not None)
        assert save.merged is not None
        if "error" in save.merged:
            refuse(save.merged | {"error": f"process {self._group.index}: {save.merged['error']}"})
        return save.merged

    def discard(self, save: JointSave) -> None:
        """Deletes what is left of the share: all of it, or the directory that it was taken from.

        On a disk of this process's own it is the step, in a store a part of it: there as far as it is known that
        nobody will ever read it.
        """
        is_lost = save.is_refused and save.written is not None and "error" not in save.written
        with contextlib.suppress(OSError):  # the next start sweeps what is left, and what some lack is never taken
            if save.staged is not None:
                commit.discard(save.staged)
            elif self._is_local and is_lost:
                commit.remove_directory(Path(save.job.target))
            elif not self._is_local and not self._has_ended and save.is_refused and (is_lost or self._is_primary):
                about = {"format": "orbax_discard", "key": save.key, "keep": None, "replace_all": False}
                self._jobs.hand_over(self._make_job(save, **about), lambda _: None)

    def forget_later(self, save: JointSave) -> None:
        """Deletes what was told of a save once nobody can ask for it any more.

        Raises:
            ServiceLost: it may still be there.
        """
        now, expired = time.monotonic(), []
        with self._changed:
            self._old_keys.append((now + 2 * (self._commit_seconds + self.grace_seconds), save.key))
            while self._old_keys[0][0] < now:
                expired.append(self._old_keys.popleft()[1])
        for key in expired:
            self._group.delete(key)

    def end(self) -> None:
        """Nothing is handed to the writer from now on: it may be gone."""
        self._has_ended = True

    @property
    def _is_primary(self) -> bool:
        return self._group.index == PRIMARY

    # ---------------------------------------------------------------------------------------------------- shares

    def _await_share(self, save: JointSave) -> dict[str, Any]:
        """Returns what to report of this process's share."""
        with self._changed:
            self._changed.wait_for(lambda: save.written is not None, save.remaining_seconds())
            written = save.written
        if written is None:
            raise Failure(f"its share was not written within {self._commit_seconds:g} s")
        refuse(written)
        common = {"step": save.job.step, "digest": self._digest}
        if self._is_local:
            return common
        return {**common, **written["note"], "target": save.job.target, "staged": str(save.staged or "")}

    def _gather(self, save: JointSave, own: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns the reports of all processes.

        Raises:
            Failure: one has failed, is late, or has saved something else; it is named.
        """
        reports: list[dict[str, Any]] = []
        for process in range(self._group.count):
            text: str | None = json.dumps(own)
            if process != self._group.index:
                text = self._group.get(f"{save.key}/{process}", save.remaining_seconds())
            if text is None:
                raise Failure(self._describe_missing(save))
            report = json.loads(text)
            if "error" in report:
                raise Failure(f"process {process}: {report['error']}", report["errno"])
            if report["digest"] != own["digest"]:
                raise Failure(f"process {process} has saved another structure than process {PRIMARY}")
            if report.get("target") != own.get("target"):
                raise Failure(
                    f"process {process} has saved to {report['target']}, process {PRIMARY} to {own['target']}"
                )
            reports.append(report)
        return reports

    def _describe_missing(self, save: JointSave) -> str:
        missing = [
            process
            for process in range(self._group.count)
            if process != self._group.index and self._group.peek(f"{save.key}/{process}") is None
        ]
        names = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
        return (
            f"process {names} of {self._group.count} has not reported its share within {self._commit_seconds:g} s; "
            "is it alive, and does it save at the same steps?"
        )

    def _merge(self, save: JointSave, reports: list[dict[str, Any]], busy: tuple[str, ...]) -> Outcome:
        assert self._merged_plan is not None
        attached = {**save.attachments, orbax_merged.REPORTS_NAME: attach_text(json.dumps(reports))}
        about = {"plan": self._merged_plan, "key": save.key, "busy": busy}
        return self.have_done(save, attached, format="orbax_merged", **about)

    def _note_merged(self, save: JointSave, outcome: Outcome) -> None:
        with self._changed:
            save.merged = outcome

    def _make_job(self, save: JointSave, **changes: Any) -> Job:
        number = self._writer.next_job_number()
        return replace(save.job, number=number, tag=self._writer.job_tag(number), slot=NO_SLOT, **changes)

    # -------------------------------------------------------------------------------------------------- decision

    def _tell(self, save: JointSave, decision: dict[str, Any]) -> None:
        """Tells all what became of it. Those that cannot hear look into the directory."""
        with contextlib.suppress(ServiceLost):
            self._group.put(f"{save.key}/decision", json.dumps(decision))
            self.forget_later(save)

    def _await_decision(self, save: JointSave) -> None:
        seconds = save.remaining_seconds() + self.grace_seconds
        try:
            decision = self._group.get(f"{save.key}/decision", seconds)
            reason = f"process {PRIMARY}, which commits, has not told what became of it in {self._commit_seconds:g} s"
        except ServiceLost as error:
            decision, reason = None, f"the coordination service does not answer ({error})"
        if decision is not None:
            told = json.loads(decision)
            save.is_refused = "error" in told and not told.get("is_unsure", False)
            refuse(told)
        elif self._is_local or not self._look_for(save, reason):
            # The primary may be slow, and its writer may have outlived it.
            raise Failure(f"{reason}; it may still appear there, and whole", is_unsure=True)

    def _look_for(self, save: JointSave, reason: str) -> bool:
        """Returns whether the step has been committed."""
        try:
            return orbax_merged.is_committed(save.job.target, save.key, self._group.count)
        except OSError as error:
            raise Failure(f"{reason}, and it cannot be looked for: {error}", is_unsure=True) from error
