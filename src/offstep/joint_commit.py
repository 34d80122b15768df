"""The commit of one checkpoint by several training processes, on threads beside the one that trains.

Each process has its writer make its share durable and reports that to all. The primary waits for the reports, merges
the shares, and tells all what became of it. Whoever is late or missing fails the save, and never makes half a step.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from offstep import commit
from offstep.attachments import Attachment, attach_text
from offstep.coordination import PRIMARY, Group, ServiceLost
from offstep.formats import orbax_merged, orbax_share
from offstep.handover import Outcome
from offstep.joint_jobs import JointJobs
from offstep.joint_save import Failure, JointSave, Upload, describe, refuse
from offstep.records import NO_SLOT, Job
from offstep.signals import held_signals
from offstep.stores.address import is_address
from offstep.writer import Writer

_GRACE = 0.1  # how much longer than the primary the others wait for what it decides, as a part of `commit_seconds`
_LEAST_GRACE_SECONDS = 1.0
_SHOWN = 8
_engine_numbers = itertools.count(1)  # the processes open their engines in the same order


class JointCommits:
    """Commits the saves of one engine together with those of the other processes, in their order.

    Args:
        group: The processes.
        writer: This process's.
        digest: Tells whether all have the same structure.
        merged_plan: Number of the plan of `orbax_merged`; the primary's, where all write to one directory.
        is_local: Whether each has a disk of its own, and makes a whole directory of what it holds.
        commit_seconds: How long after its snapshot a save may take until all have reported.
    """

    def __init__(
        self,
        group: Group,
        writer: Writer,
        *,
        digest: str,
        merged_plan: int | None,
        is_local: bool,
        commit_seconds: float,
    ) -> None:
        self._group, self._writer = group, writer
        self._digest, self._merged_plan, self._commit_seconds = digest, merged_plan, commit_seconds
        self._is_local = is_local
        number = next(_engine_numbers)
        self._meeting_key = f"offstep/{number}"
        self._repeats: Counter[tuple[str, int]] = Counter()  # how often a step was saved to a place
        self._old_keys: deque[tuple[float, str]] = deque()  # with the time when nobody asks for them any more
        self._changed = threading.Condition()  # guards everything below, and the saves
        # Names this engine in all processes and runs; `None` until it is known that the primary has opened it.
        self._session = f"{writer.run}/{number}" if self.is_primary else None
        self._unsubmitted: deque[JointSave] = deque()
        self._uncommitted: deque[JointSave] = deque()
        self._finished: deque[tuple[JointSave, Outcome]] = deque()
        self._is_closed = self._has_ended = False
        self._jobs = JointJobs(writer, self._changed)
        # A daemon, because `close` at exit waits for its work before it ends it.
        self._thread = threading.Thread(target=self._commit_all, name="offstep-commit", daemon=True)
        self._thread.start()

    @property
    def _grace_seconds(self) -> float:
        return max(_LEAST_GRACE_SECONDS, _GRACE * self._commit_seconds)

    @property
    def is_primary(self) -> bool:
        """Whether this process commits."""
        return self._group.index == PRIMARY

    @property
    def writes_common(self) -> bool:
        """Whether this process writes what a checkpoint has once: the one that commits, each on a disk of its own."""
        return self.is_primary or self._is_local

    # --------------------------------------------------------------------------------------- the training thread

    def submit(
        self,
        job: Job,
        attachments: Mapping[str, Attachment],
        *,
        on_submitted: Callable[[], None],
        on_written: Callable[[], None],
        on_outcome: Callable[[Outcome], None],
        upload: Upload | None = None,
    ) -> None:
        """Takes a save; never waits. Its share goes to the writer at once, or when the primary has begun.

        Args:
            job: What this process would write if it were alone.
            attachments: Files to put into the checkpoint, each of another name in each process.
            on_submitted: Called when the writer has the share, or never will.
            on_written: Called when the slot is free again. Both on any thread.
            on_outcome: Called once by `take_in`, with what became of the checkpoint, as the writer would say it.
            upload: A copy to be made when it is durable; the primary's is.
        """
        deadline = time.monotonic() + self._commit_seconds
        save = JointSave(job, attachments, on_submitted, on_written, on_outcome, upload, deadline)
        with self._changed:
            self._unsubmitted.append(save)
            self._uncommitted.append(save)
            if self._session is not None:
                self._submit_shares()
            self._changed.notify_all()

    def take_in(self, timeout_seconds: float = 0.0, until: Callable[[], bool] = lambda: False) -> None:
        """Passes outcomes on, on the caller's thread; waits for them until `until` is true, or the time is over."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            with held_signals():  # a handler that waits for a save must not do so in the middle of this
                while self._finished:
                    save, outcome = self._finished.popleft()
                    save.on_outcome(outcome)
                    with self._changed:
                        self._changed.notify_all()
            with self._changed:
                remaining = deadline - time.monotonic()
                if until() or remaining <= 0:
                    return
                if not self._finished:
                    self._changed.wait(remaining)

    def wake(self) -> None:
        """Has `take_in` look again whether what it waits for is so."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the threads; all saves have their outcomes."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        self._jobs.close()
        self._has_ended = True

    # ------------------------------------------------------------------------------------------------ the writer

    def _submit_shares(self) -> None:
        """Hands over what waits for that, in order; with `_changed` held."""
        while self._unsubmitted:
            save = self._unsubmitted.popleft()
            place = (save.job.target, save.job.step)
            self._repeats[place] += 1
            save.key = f"offstep/{self._session}/{save.job.step}/{self._repeats[place]}"
            # What is older goes when all have this step.
            job = replace(save.job, keep=None, replace_all=False)
            if self._is_local:
                part = self._group.index, self._group.count
                job = replace(job, manifest=job.manifest | {"part": part})
            else:
                job = replace(job, format="orbax_share", key=save.key)
                save.staged = None if is_address(job.target) else orbax_share.staging_path(job)
            # The primary's come in when it commits: a share may have nothing but these.
            own = {} if self.is_primary and not self._is_local else save.attachments
            self._jobs.hand_over(job, partial(self._note_written, save), own)
            save.on_submitted()

    def _note_written(self, save: JointSave, outcome: Outcome) -> None:
        with self._changed:
            save.written = outcome
            save.on_written()
            is_late = save.is_settled
        if is_late:
            self._discard(save)

    def _note_merged(self, save: JointSave, outcome: Outcome) -> None:
        with self._changed:
            save.merged = outcome

    # --------------------------------------------------------------------------------------------- one checkpoint

    def _commit_all(self) -> None:
        if self.is_primary:
            with contextlib.suppress(ServiceLost):  # the first save says so
                self._group.put(self._meeting_key, f"{self._writer.run}/{self._meeting_key.rpartition('/')[2]}")
        while (save := self._wait_for_save()) is not None:
            try:
                outcome = self._commit(save)
            except Exception as error:  # noqa: BLE001  whatever it is, the training thread must hear of it
                outcome = describe(error)
            with self._changed:
                save.is_settled = True
                self._uncommitted.popleft()
                if save in self._unsubmitted:
                    self._unsubmitted.remove(save)
                    save.on_written()
                save.on_submitted()
                self._finished.append((save, outcome))
                self._changed.notify_all()
                is_written = save.written is not None
            if is_written:
                self._discard(save)
            self._upload(save, outcome)

    def _wait_for_save(self) -> JointSave | None:
        """Returns the oldest that is not committed; `None` once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or bool(self._uncommitted))
            return None if self._is_closed else self._uncommitted[0]

    def _commit(self, save: JointSave) -> Outcome:
        self._meet(save)
        report: dict[str, Any]
        try:
            report = self._await_share(save)
        except Failure as failure:
            report = describe(failure)
        if not self.is_primary:
            self._group.put(f"{save.key}/{self._group.index}", json.dumps(report))
            save.is_refused = "error" in report  # the primary never commits without it
            refuse(report)
            self._await_decision(save)
            return self._describe_durable(save, self._retire(save))
        try:
            reports = self._gather(save, report)
            merged = None if self._is_local else self._merge(save, reports)
        except Failure as failure:
            save.is_refused = not failure.is_unsure
            self._decide(save, describe(failure))
            raise
        self._decide(save, {})
        return self._describe_durable(save, merged or self._retire(save))

    def _meet(self, save: JointSave) -> None:
        """Waits until the primary has begun: then the target is its own, and it sweeps there no more."""
        if self._session is None:
            session = self._group.get(self._meeting_key, save.remaining_seconds())
            if session is None:
                raise Failure(f"process {PRIMARY} has not begun to save within {self._commit_seconds:g} s")
            with self._changed:
                self._session = session
                self._submit_shares()

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

    def _merge(self, save: JointSave, reports: list[dict[str, Any]]) -> Outcome:
        assert self._merged_plan is not None
        attached = {**save.attachments, orbax_merged.REPORTS_NAME: attach_text(json.dumps(reports))}
        with self._changed:
            busy = tuple(other.job.target for other in self._uncommitted if other is not save)
        about = {"plan": self._merged_plan, "key": save.key, "busy": busy}
        return self._have_done(save, attached, format="orbax_merged", **about)

    def _retire(self, save: JointSave) -> Outcome | None:
        """Lets older steps go from this process's own disk, now that all have this one."""
        return self._have_done(save, {}, format="orbax_retire") if self._is_local else None

    def _have_done(self, save: JointSave, attachments: Mapping[str, Attachment], **changes: Any) -> Outcome:
        """Has the writer do a job without a slot."""
        self._jobs.hand_over(self._make_job(save, **changes), partial(self._note_merged, save), attachments)
        with self._changed:
            self._changed.wait_for(lambda: save.merged is not None)
        assert save.merged is not None
        if "error" in save.merged:
            refuse(save.merged | {"error": f"process {self._group.index}: {save.merged['error']}"})
        return save.merged

    def _make_job(self, save: JointSave, **changes: Any) -> Job:
        number = self._writer.next_job_number()
        return replace(save.job, number=number, tag=self._writer.job_tag(number), slot=NO_SLOT, **changes)

    def _discard(self, save: JointSave) -> None:
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
            elif not self._is_local and not self._has_ended and save.is_refused and (is_lost or self.is_primary):
                self._jobs.hand_over(self._make_job(save, format="orbax_discard", key=save.key), lambda _: None)

    def _upload(self, save: JointSave, outcome: Outcome) -> None:
        """Has a copy made of a step that is durable: before a later one is committed, which may retire it."""
        if save.upload is not None and "error" in outcome:
            save.upload.on_outcome({"withdrawn": True})
            self.wake()
        elif save.upload is not None:
            self._jobs.hand_over(save.upload.job, save.upload.on_outcome)

    def _decide(self, save: JointSave, decision: dict[str, Any]) -> None:
        """Tells all what became of it. Those that cannot hear look into the directory."""
        with contextlib.suppress(ServiceLost):
            self._group.put(f"{save.key}/decision", json.dumps(decision))
            now = time.monotonic()
            self._old_keys.append((now + 2 * (self._commit_seconds + self._grace_seconds), save.key))
            while self._old_keys[0][0] < now:
                self._group.delete(self._old_keys.popleft()[1])

    def _await_decision(self, save: JointSave) -> None:
        seconds = save.remaining_seconds() + self._grace_seconds
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
            raise Failure(reason)

    def _look_for(self, save: JointSave, reason: str) -> bool:
        """Returns whether the step has been committed."""
        try:
            return orbax_merged.is_committed(save.job.target, save.key, self._group.count)
        except OSError as error:
            raise Failure(f"{reason}, and it cannot be looked for: {error}", is_unsure=True) from error

    def _describe_durable(self, save: JointSave, merged: Outcome | None = None) -> Outcome:
        assert save.written is not None
        last = {"durable_at": time.monotonic()} if merged is None else merged
        parts = [save.written] if merged is None else [save.written, merged]
        sums = {name: sum(part[name] for part in parts) for name in ("cpu_seconds", "write_seconds", "written_bytes")}
        remarks = [remark for part in parts for remark in part["remarks"]]
        return {**save.written, **last, **sums, "remarks": remarks}
