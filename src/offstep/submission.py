"""One save between its snapshot and its outcome, and the job that the writer gets for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from offstep.attachments import Attachment
from offstep.buffers import Slot, SlotPool
from offstep.options import Options
from offstep.ownership import Lock
from offstep.pending import PendingSave
from offstep.records import Job, Target
from offstep.rendering import Rendering, read_arrays
from offstep.retention import Ranking
from offstep.snapshot import Snapshotter
from offstep.writer import Writer


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
    is_ready: bool = False  # slots touched, or being touched, and the writer started


@dataclass(frozen=True)
class Work:
    """One save between snapshot and outcome."""

    number: int
    opened: Opened
    slot: Slot
    pending: PendingSave
    target: Callable[[int], Target]
    step_leaf: int | None
    step_divisor: int
    manifest: dict[str, Any]  # JSON
    attachments: Mapping[str, Attachment]
    started: float
    ranking: Ranking

    def read_step(self) -> int:
        """Returns the step that the snapshot itself holds."""
        assert self.step_leaf is not None
        layout = self.opened.snapshotter.plan.leaves[self.step_leaf]
        count = self.slot.buffer[layout.offset : layout.offset + layout.chunk_bytes]
        return int.from_bytes(count, "little") // self.step_divisor


def render(work: Work, remark: Callable[[str], None]) -> bytes | None:
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
        manifest=work.manifest | {"step": step, "run": work.opened.writer.run},
        ranking=asdict(work.ranking),
        lock=work.opened.lock_number,
        full_every=options.full_every,
        retry_seconds=options.retry_seconds,
        private=options.private,
    )
