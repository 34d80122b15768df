"""One save from its snapshot to its outcome, and the job that the writer gets for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from types import MethodType
from typing import Any

from offstep.arrays import Array
from offstep.attachments import Attachment
from offstep.buffers import Slot, SlotPool
from offstep.joint_commit import JointCommits
from offstep.joint_save import Upload
from offstep.options import Options
from offstep.ownership import Lock
from offstep.pending import PendingSave
from offstep.records import NO_SLOT, Job, Target
from offstep.rendering import Rendering, make_image, read_arrays
from offstep.reports import Outcome, Reports
from offstep.retention import Ranking
from offstep.snapshot import Snapshotter
from offstep.writer import Writer

OnDurable = Callable[[PendingSave], None]


@dataclass
class Opened:
    """What an engine has between `open` and `close`."""

    writer: Writer
    format: str
    plan: int
    snapshotter: Snapshotter
    pool: SlotPool
    fetcher: ThreadPoolExecutor | None
    rendering: Rendering | None
    lock: Lock | None
    lock_number: int | None
    joint: JointCommits | None = None  # where the state spans several processes
    is_ready: bool = False  # slots touched, or being touched, and the writer started

    def collect(self, timeout_seconds: float = 0.0, until: Callable[[], bool] = lambda: False) -> None:
        """Takes in what has become of saves; waits as long for it, unless `until` is true."""
        collect = self.writer.collect if self.joint is None else self.joint.take_in
        collect(timeout_seconds, until)


@dataclass(frozen=True)
class Work:
    """One save between snapshot and outcome."""

    number: int
    opened: Opened
    slot: Slot
    pending: PendingSave
    target: Callable[[int], Target]
    started: float
    step_leaf: int | None = None
    step_divisor: int = 1
    manifest: dict[str, Any] | None = None  # JSON
    attachments: Mapping[str, Attachment] | None = None
    ranking: Ranking | None = None

    def read_step(self) -> int:
        """Returns the step that the snapshot itself holds."""
        assert self.step_leaf is not None
        layout = self.opened.snapshotter.plan.leaves[self.step_leaf]
        count = self.slot.buffer[layout.offset : layout.offset + layout.chunk_bytes]
        return int.from_bytes(count, "little") // self.step_divisor


class Submitter:
    """Takes snapshots into slots that were acquired for them, hands them to the writer, and takes the outcomes in.

    Args:
        options: How to work.
        reports: Is told what becomes of each save.
        on_durable: See `Engine`.
    """

    def __init__(self, options: Options, reports: Reports, on_durable: OnDurable | None) -> None:
        self._options, self._reports = options, reports
        # Weak where it can be: the owner of a method must not live on because a save is open here.
        self._on_durable: Callable[[], OnDurable | None] = (
            weakref.WeakMethod(on_durable) if isinstance(on_durable, MethodType) else lambda: on_durable
        )

    @property
    def on_durable(self) -> OnDurable | None:
        """What is called with a save that has become durable, while it lives."""
        return self._on_durable()

    def hand_over(self, work: Work, arrays: Sequence[Array]) -> None:
        """Takes the snapshot and has it written; on the training thread. An error leaves the slot free."""
        self._reports.expect(work.number, work.pending)
        try:
            self._start(work, arrays)
        except BaseException:
            if self._can_give_up(work):
                self._reports.call_off(work.number)
                work.opened.pool.release(work.slot)
            raise

    def _start(self, work: Work, arrays: Sequence[Array]) -> None:
        opened = work.opened
        if opened.snapshotter.mode == "device_copy":
            self._queue(work, opened.snapshotter.copy_on_device(arrays))
            return
        opened.snapshotter.take(arrays, work.slot, are_computed=True)
        if opened.rendering is None or (opened.rendering.is_settled and self._is_queue_empty(work)):
            self.submit(work)
        else:
            self._queue(work, None)

    def _is_queue_empty(self, work: Work) -> bool:
        # Saves must reach the writer in their order: two may have one target.
        return all(pending.wait_until_submitted(0) for pending in self._reports.pending if pending is not work.pending)

    def _queue(self, work: Work, private: list[Array] | None) -> None:
        assert work.opened.fetcher is not None
        work.opened.fetcher.submit(self._fetch, work, private)

    def _fetch(self, work: Work, private: list[Array] | None) -> None:
        """Runs on the fetching thread."""
        try:
            if private is not None:
                work.opened.snapshotter.fetch(private, work.slot)
            self.submit(work, _render(work, self._reports.remark))
        except Exception as error:  # noqa: BLE001  reported like any failure of the writer
            text = f"{type(error).__name__}: {error}"
            if self._can_give_up(work):
                self._take_outcome(work, {"error": text, "errno": None})
            else:
                self._reports.remark(f"after step {work.pending.step} had been handed to the writer: {text}")
                work.pending.mark_submitted()

    def _can_give_up(self, work: Work) -> bool:
        """Takes a save back after an error; false when the writer has begun, and will report, or has reported."""
        return not work.pending.done() and work.opened.writer.call_off(work.number)

    def submit(self, work: Work, content: bytes | None = None) -> None:
        """Hands the snapshot in the slot to the writer; any thread.

        Args:
            work: A save that `reports` expects.
            content: The file, where the trainer had to make it.
        """
        step = work.pending.step if work.step_leaf is None else work.read_step()
        target = work.target(step)
        work.pending.change(step=step, path=target.shown)
        job = describe_job(work, step, target, self._options)
        if work.opened.joint is not None:
            work.opened.joint.submit(
                job,
                work.attachments or {},
                on_submitted=work.pending.mark_submitted,
                on_written=lambda: work.opened.pool.release(work.slot),
                on_outcome=lambda outcome: self._settle(work, outcome),
                upload=self._expect_upload(work, job, target) if work.opened.joint.writes_common else None,
            )
            return
        image = None if content is None else make_image(content)
        if image is not None and content is not None:
            job = replace(job, format="whole_file", slot=image.number, file_bytes=len(content))
            work.opened.writer.add_slot(image)
        try:
            work.opened.writer.submit(job, lambda outcome: self._take_outcome(work, outcome, image), work.attachments)
        except BaseException:
            if image is not None and self._can_give_up(work):
                _drop_image(work, image)
            raise
        work.pending.mark_submitted()
        upload = self._expect_upload(work, job, target)
        if upload is not None:  # the writer need not hear of it again if we die
            work.opened.writer.submit(upload.job, upload.on_outcome)

    def _expect_upload(self, work: Work, job: Job, target: Target) -> Upload | None:
        """Returns the copy that the writer is to make once the step is durable, if one is due."""
        address = target.upload
        if address is None:
            return None
        number = work.opened.writer.next_job_number()
        upload = replace(
            job,
            number=number,
            format="upload",
            slot=NO_SLOT,
            source=job.target,
            target=str(address / str(job.step)),
            base=str(address),
            root=str(address),
            keep=target.upload_keep,
            replace_all=False,
            lock=None,
        )
        self._reports.expect_upload(number, upload.target)
        return Upload(upload, lambda outcome: self._reports.take_in_upload(number, job.step, outcome))

    def _take_outcome(self, work: Work, outcome: Outcome, image: Slot | None = None) -> None:
        if image is not None:
            _drop_image(work, image)
        work.opened.pool.release(work.slot)
        self._settle(work, outcome)
        if work.opened.joint is not None:  # it failed before it came there
            work.opened.joint.wake()

    def _settle(self, work: Work, outcome: Outcome) -> None:
        failure = self._reports.take_in(work.number, outcome, work.started)
        work.pending.settle(failure)
        on_durable = self.on_durable
        if failure is None and on_durable is not None:
            on_durable(work.pending)


def _render(work: Work, remark: Callable[[str], None]) -> bytes | None:
    """Returns the file where the trainer has to make it, else `None`; `remark` is told once why it has to."""
    rendering = work.opened.rendering
    if rendering is None or rendering.is_settled:
        return None
    arrays = read_arrays(work.opened.snapshotter.plan, work.slot.buffer)
    is_known = bool(rendering.difference)
    if not rendering.has_to_render(arrays):
        return None
    if rendering.difference and not is_known:
        remark(f"{rendering.difference}: from now on Keras writes each file, on a thread beside fit.")
    return rendering.render(arrays)


def describe_job(work: Work, step: int, target: Target, options: Options) -> Job:
    """Returns what the writer has to be told."""
    return Job(
        number=work.number,
        step=step,
        format=work.opened.format,
        target=str(target.root / str(step) if target.file is None else target.file),
        base=str(target.base),
        root=str(target.root),
        slot=work.slot.number,
        plan=work.opened.plan,
        tag=work.opened.writer.job_tag(work.number),
        keep=target.keep,
        replace_all=target.replace_all,
        siblings=target.siblings,
        manifest=(work.manifest or {}) | {"step": step, "run": work.opened.writer.run, "number": work.number},
        ranking=asdict(work.ranking or Ranking()),
        lock=work.opened.lock_number,
        full_every=options.full_every,
        retry_seconds=options.retry_seconds,
        private=options.private,
    )


def _drop_image(work: Work, image: Slot) -> None:
    work.opened.writer.drop_slot(image)
    image.close()
