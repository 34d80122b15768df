"""The commits of the checkpoints of several training processes, in their order, on threads beside the one that trains.

Each process has its writer make its share durable; what becomes of the whole `joint_decisions` decides.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from offstep.attachments import Attachment
from offstep.coordination import PRIMARY, Group, ServiceLost
from offstep.formats import orbax_share
from offstep.handover import Outcome
from offstep.joint_copies import JointCopies
from offstep.joint_decisions import JointDecisions
from offstep.joint_jobs import JointJobs
from offstep.joint_save import Failure, JointSave, Upload, describe
from offstep.records import Job
from offstep.signals import held_signals
from offstep.stores.address import is_address
from offstep.writer import Writer

_engine_numbers = itertools.count(1)  # the processes open their engines in the same order


class JointCommits:
    """Commits the saves of one engine together with those of the other processes, in their order.

    Args:
        group: The processes.
        writer: This process's.
        digest: Tells whether all have the same structure.
        share_plan: Number of the plan of this process's share; `None` where nothing is shared out.
        merged_plan: Number of the plan of `orbax_merged`; the primary's, where something is shared out.
        is_local: Whether each has a disk of its own, and makes a whole directory of what it holds; what is shared out
            is then copied from there.
        commit_seconds: How long after its snapshot a save may take until all have reported.
    """

    def __init__(
        self,
        group: Group,
        writer: Writer,
        *,
        digest: str,
        share_plan: int | None,
        merged_plan: int | None,
        is_local: bool,
        commit_seconds: float,
    ) -> None:
        self._group, self._writer = group, writer
        # The plan of the saves, which a share's is where nothing is copied, whoever has opened this drops.
        self._plans = [plan for plan in (share_plan if is_local else None, merged_plan) if plan is not None]
        self._is_local, self._commit_seconds = is_local, commit_seconds
        number = next(_engine_numbers)
        self._meeting_key = f"offstep/{number}"
        self._repeats: Counter[tuple[str, int]] = Counter()  # how often a step was saved to a place
        self._changed = threading.Condition()  # guards everything below, and the saves
        # Names this engine in all processes and runs; `None` until it is known that the primary has opened it.
        self._session = f"{writer.run}/{number}" if self.is_primary else None
        self._unsubmitted: deque[JointSave] = deque()
        self._uncommitted: deque[JointSave] = deque()
        self._finished: deque[tuple[JointSave, Outcome]] = deque()
        self._is_closed = False
        self._jobs = JointJobs(writer, self._changed)
        about: dict[str, Any] = {"digest": digest, "merged_plan": merged_plan, "commit_seconds": commit_seconds}
        self._decisions = JointDecisions(group, writer, self._jobs, self._changed, is_local=is_local, **about)
        self._copies: JointCopies | None = None
        if is_local and share_plan is not None:
            self._copies = JointCopies(group, writer, self._jobs, self._changed, share_plan=share_plan, **about)
        # A daemon, because `close` at exit waits for its work before it ends it.
        self._thread = threading.Thread(target=self._commit_all, name="offstep-commit", daemon=True)
        self._thread.start()

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
            upload: A copy to be made when it is durable: the primary's is, and from disks of their own that of all.
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
        if self._copies is not None:
            self._copies.close()
        self._jobs.close()
        self._decisions.end()
        if self._copies is not None:
            self._copies.end()
        for plan in self._plans:
            self._writer.drop_plan(plan)

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
                job = replace(job, manifest=job.manifest | {"part": part, "save": save.key})
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
            self._decisions.discard(save)

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
                self._decisions.discard(save)
            self._upload(save, outcome)

    def _wait_for_save(self) -> JointSave | None:
        """Returns the oldest that is not committed; `None` once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or bool(self._uncommitted))
            return None if self._is_closed else self._uncommitted[0]

    def _commit(self, save: JointSave) -> Outcome:
        self._meet(save)
        merged = self._decisions.decide(save, partial(self._list_busy, save))
        if self._is_local:  # now that all have this one, older steps may go from this process's own disk
            busy = () if self._copies is None else self._copies.sources
            try:
                merged = self._decisions.have_done(save, {}, format="orbax_retire", busy=busy)
            except Failure as failure:  # it is durable in all, and all have it copied
                remark = f"step {save.job.step} is durable, but older ones may not have been deleted: {failure}"
                outcome = _describe_durable(save, None)
                return outcome | {"remarks": [*outcome["remarks"], remark]}
        return _describe_durable(save, merged)

    def _list_busy(self, save: JointSave) -> tuple[str, ...]:
        with self._changed:
            return tuple(other.job.target for other in self._uncommitted if other is not save)

    def _meet(self, save: JointSave) -> None:
        """Waits until the primary has begun: then the target is its own, and it sweeps there no more."""
        if self._session is None:
            session = self._group.get(self._meeting_key, save.remaining_seconds())
            if session is None:
                raise Failure(f"process {PRIMARY} has not begun to save within {self._commit_seconds:g} s")
            with self._changed:
                self._session = session
                self._submit_shares()

    def _upload(self, save: JointSave, outcome: Outcome) -> None:
        """Has a copy made of a step that is durable: before a later one is committed, which may retire it."""
        if save.upload is not None and "error" in outcome:
            save.upload.on_outcome({"withdrawn": True})
            self.wake()
        elif save.upload is not None and self._copies is not None:
            self._copies.add(save.key, save.upload)
        elif save.upload is not None:
            self._jobs.hand_over(save.upload.job, save.upload.on_outcome)


def _describe_durable(save: JointSave, merged: Outcome | None) -> Outcome:
    assert save.written is not None
    last = {"durable_at": time.monotonic()} if merged is None else merged
    parts = [save.written] if merged is None else [save.written, merged]
    sums = {name: sum(part[name] for part in parts) for name in ("cpu_seconds", "write_seconds", "written_bytes")}
    remarks = [remark for part in parts for remark in part["remarks"]]
    return {**save.written, **last, **sums, "remarks": remarks}
