"""The engine: joins snapshot, slots and writer for one state at a time, and keeps count.

The training thread calls it. It knows arrays and targets, not Keras.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MethodType
from typing import Any

from offstep import lifecycle, writer
from offstep.attachments import Attachment
from offstep.buffers import Slot, SlotPool
from offstep.errors import SaveFailed
from offstep.formats import FORMATS
from offstep.options import Options
from offstep.pending import PendingSave
from offstep.records import Job, Leaf, PathKey, SaveStats
from offstep.rendering import Rendering, make_image, read_arrays
from offstep.reports import Counts, Outcome, Reports
from offstep.retention import Ranking
from offstep.snapshot import Array, Snapshotter


@dataclass(frozen=True)
class Target:
    """Where one checkpoint goes.

    Attributes:
        base: Existing directory below which everything happens.
        root: Directory of steps; the checkpoint is `root/<step>`. For a single file, the directory that it is in.
        shown: The path that the user is told.
        keep: How many of the newest steps stay; `None` keeps all.
        replace_all: Whether all other steps of the root go.
        file: The checkpoint itself, where it is a single file.
        siblings: Other files that `keep` counts, oldest first.
    """

    base: Path
    root: Path
    shown: str
    keep: int | None = None
    replace_all: bool = False
    file: Path | None = None
    siblings: tuple[str, ...] = ()


@dataclass
class _Opened:
    """What exists between `open` and `close`."""

    writer: writer.Writer
    format: str
    plan: int
    snapshotter: Snapshotter
    pool: SlotPool
    fetcher: ThreadPoolExecutor | None
    rendering: Rendering | None


OnDurable = Callable[[PendingSave], None]


class Engine:
    """Takes snapshots of one state and has them written. One thread saves; any may wait.

    Args:
        options: How to work.
        on_durable: Called on the thread that takes reports in, once for each save that has become durable; a method
            only while its object lives.
    """

    def __init__(self, options: Options, on_durable: OnDurable | None = None) -> None:
        self._options = options
        # Weak where it can be: the owner of a method must not live on because a save is open here.
        self._on_durable: Callable[[], OnDurable | None] = (
            weakref.WeakMethod(on_durable) if isinstance(on_durable, MethodType) else lambda: on_durable
        )
        self._opened: _Opened | None = None
        self._reports = Reports(options.on_error)
        self._tie: weakref.finalize[..., object] | None = None

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self._options, self._on_durable())  # a copy of a callback saves for itself

    @property
    def stats(self) -> list[SaveStats]:
        """What each of the last 100,000 saves cost, oldest first."""
        return self._reports.stats

    @property
    def counts(self) -> Counts:
        """How many saves there were."""
        return self._reports.counts

    @property
    def is_writing(self) -> bool:
        """Whether a save has not become durable yet, or failed, as far as reports have been taken in."""
        return bool(self._reports.pending)

    # ------------------------------------------------------------------------------------------ open and close

    def open(
        self,
        leaves: Sequence[Leaf],
        arrays: Sequence[Array],
        *,
        format: str = "orbax_directory",  # noqa: A002  the word that records and formats use
        empty_nodes: Sequence[tuple[tuple[PathKey, ...], str]] = (),
        documents: dict[str, Any] | None = None,
        rendering: Rendering | None = None,
        owner: object | None = None,
    ) -> None:
        """Makes plan and slots for one structure and starts the writer, all in the background where it takes long.

        An earlier structure is finished and given up first. `format` is a key of `formats.FORMATS`; `documents` is
        JSON that its `prepare` takes; `rendering` makes the files that the writer cannot make. When `owner` is gone
        without a `close`, the engine is closed for it once its saves are done.

        Raises:
            BudgetExceeded: not even one snapshot fits into the memory budget.
            UnsupportedLeaf: a leaf that stock readers could not read back.
        """
        self.close()
        lifecycle.close_abandoned()  # before a budget is taken of what memory there is
        options = self._options
        plan = FORMATS[format].place(leaves, empty_nodes)
        snapshotter = Snapshotter(plan, arrays, mode=options.snapshot_mode, threads=options.copy_threads)
        pool = SlotPool(plan.slot_bytes, options.slots, budget_bytes=options.memory_budget)
        borrowed = writer.borrow_shared(in_process=options.in_process)
        for slot in pool.slots:
            borrowed.add_slot(slot)
        number = borrowed.add_plan(plan, format, documents)
        needs_thread = snapshotter.mode != "host" or rendering is not None
        fetcher = ThreadPoolExecutor(1, "offstep-fetch") if needs_thread else None
        lifecycle.add(self)
        self._tie = None if owner is None else lifecycle.tie(self, owner)
        self._opened = _Opened(borrowed, format, number, snapshotter, pool, fetcher, rendering)

    def close(self) -> None:
        """Waits for all saves, then gives slots and writer back. Failures stay to be reported by `poll`."""
        if self._opened is None:
            return
        self.wait_all(None)
        opened, self._opened = self._opened, None
        if self._tie is not None:
            self._tie.detach()
        if opened.fetcher is not None:
            opened.fetcher.shutdown()
        for slot in opened.pool.slots:
            opened.writer.drop_slot(slot)
        opened.writer.drop_plan(opened.plan)
        opened.pool.close()
        writer.return_shared(in_process=self._options.in_process)
        self._retire_if_finished()
        lifecycle.close_abandoned()  # the writer works in order: what they submitted before us is done

    def close_if_idle(self) -> bool:
        """Closes it unless a save is pending; never waits for one; returns whether it is closed."""
        if self._opened is not None:
            self._opened.writer.collect()
        if not self._reports.pending:
            self.close()
        return self._opened is None

    def _retire_if_finished(self) -> None:
        if self._opened is None and not self._reports.has_untold:
            lifecycle.remove(self)

    def describe_unfinished(self) -> str:
        """Says what becomes of the saves that are still pending when nobody waits for them any longer."""
        fate = (
            "are lost" if self._opened is None or self._opened.writer.in_process else "are left to the writer process"
        )
        return f"interrupted at exit; {len(self._reports.pending)} saves that were not durable yet {fate}"

    def take_failures(self) -> list[SaveFailed]:
        """Returns the failures that nobody has been told of, and forgets them."""
        return self._reports.take_failures()

    def forget_after_fork(self) -> None:
        """In a forked child: gives up the parent's slots; the next `matches` asks for slots of the child's own."""
        opened, self._opened = self._opened, None
        self._reports.forget_pending()
        if opened is not None:
            opened.pool.abandon()

    # -------------------------------------------------------------------------------------------------- saving

    def matches(self, arrays: Sequence[Array]) -> bool:
        """Returns whether `open` was called for a structure like this one."""
        return self._opened is not None and self._opened.snapshotter.matches(arrays)

    def save(
        self,
        arrays: Sequence[Array],
        step: int,
        target: Callable[[int], Target],
        *,
        step_leaf: int | None = None,
        step_divisor: int = 1,
        manifest: dict[str, Any] | None = None,
        ranking: Ranking | None = None,
        attachments: Mapping[str, Attachment] | None = None,
        note: str = "",
        started: float | None = None,
        compute_seconds: float = 0.0,
    ) -> PendingSave | None:
        """Takes a snapshot and submits it; what it returns is not durable yet.

        Blocks while no slot is free (`on_busy="wait"`), and for the copy on the CPU backend. Once it has returned,
        the checkpoint is written even if this process is killed (on accelerators: once its transfer has ended).

        Args:
            arrays: The state, in the order given to `open`.
            step: Training step.
            target: Gives the place for a step.
            step_leaf: Index of an array that holds the step itself; then `step` is only what is expected.
            step_divisor: How many counts of that array make one step.
            manifest: JSON to keep with the checkpoint.
            ranking: Which steps stay beside the newest ones.
            attachments: Files to put into the checkpoint, by name.
            note: Kept with the pending save.
            started: `time.monotonic()` at which the caller's hook began.
            compute_seconds: How long it has waited since then until a training step was computed.

        Returns:
            The pending save, or `None` when it was skipped: no slot was free (`on_busy="skip"`), or none was to be
            had (`"latest"`: each is being written, or filled from a device).
        """
        opened = self._opened
        assert opened is not None, "open() comes first"
        started = time.monotonic() if started is None else started
        self.counts.requested += 1
        slot, waited = self._acquire(opened)
        state_bytes = opened.snapshotter.plan.state_bytes
        stats = SaveStats(step, target(step).shown, state_bytes, 0.0, waited, compute_seconds=compute_seconds)
        pending = PendingSave(stats, note, self)
        if slot is None:
            pending.change(call_seconds=time.monotonic() - started)
            self._reports.keep(pending)
            self._reports.skip(pending)
            return None
        number = opened.writer.next_job_number()
        work = _Work(
            number,
            opened,
            slot,
            pending,
            target,
            step_leaf,
            step_divisor,
            manifest or {},
            attachments or {},
            started,
            ranking or Ranking(),
        )
        self._reports.expect(number, pending)
        try:
            self._start(work, arrays)
        except BaseException:
            if opened.writer.call_off(number):  # else the writer has begun, and will report
                self._reports.call_off(number)
                opened.pool.release(slot)
            raise
        pending.change(call_seconds=time.monotonic() - started)
        self._reports.keep(pending)
        return pending

    def _acquire(self, opened: _Opened) -> tuple[Slot | None, float]:
        slot = opened.pool.try_acquire()
        if slot is None and self._options.on_busy == "latest":
            slot = self._replace_oldest(opened)
        if slot is not None or self._options.on_busy != "wait":
            return slot, 0.0
        started = time.monotonic()
        while slot is None:
            self._advance(until=lambda: opened.pool.has_free)
            slot = opened.pool.try_acquire()
        return slot, time.monotonic() - started

    def _replace_oldest(self, opened: _Opened) -> Slot | None:
        """Takes the slot of the oldest snapshot that nobody has begun to write; `None` where there is none.

        The oldest: with three slots or more, a newer one stays submitted if this process is killed meanwhile.
        """
        opened.writer.collect()
        if not opened.pool.has_free:
            any(opened.writer.withdraw(number) for number in self._reports.pending_numbers)
        return opened.pool.try_acquire()

    def _start(self, work: _Work, arrays: Sequence[Array]) -> None:
        opened = work.opened
        if opened.snapshotter.settle_mode(arrays) == "device_copy":
            self._queue(work, opened.snapshotter.copy_on_device(arrays))
            return
        before = time.monotonic()
        opened.snapshotter.wait_until_computed(arrays)
        computed = work.pending.stats.compute_seconds + time.monotonic() - before
        work.pending.change(compute_seconds=computed)
        opened.snapshotter.take(arrays, work.slot)
        if opened.rendering is None or (opened.rendering.is_settled and self._is_queue_empty(work)):
            self._submit(work)
        else:
            self._queue(work, None)

    def _is_queue_empty(self, work: _Work) -> bool:
        # Saves must reach the writer in their order: two may have one target.
        return all(pending.wait_until_submitted(0) for pending in self._reports.pending if pending is not work.pending)

    def _queue(self, work: _Work, private: list[Array] | None) -> None:
        assert work.opened.fetcher is not None
        work.opened.fetcher.submit(self._fetch, work, private)

    def _fetch(self, work: _Work, private: list[Array] | None) -> None:
        """Runs on the fetching thread."""
        try:
            if private is not None:
                work.opened.snapshotter.fetch(private, work.slot)
            self._submit(work, self._render(work))
        except Exception as error:  # noqa: BLE001  reported like any failure of the writer
            self._take_outcome(work, {"error": f"{type(error).__name__}: {error}", "errno": None})

    def _render(self, work: _Work) -> bytes | None:
        """Returns the file where the trainer has to make it, else `None`."""
        rendering = work.opened.rendering
        if rendering is None or rendering.is_settled:
            return None
        arrays = read_arrays(work.opened.snapshotter.plan, work.slot.buffer)
        is_known = bool(rendering.difference)
        if not rendering.has_to_render(arrays):
            return None
        if rendering.difference and not is_known:
            text = f"{rendering.difference}: from now on Keras writes each file, on a thread beside fit."
            self._reports.remark(text)
        return rendering.render(arrays)

    def _submit(self, work: _Work, content: bytes | None = None) -> None:
        step = work.pending.step if work.step_leaf is None else work.read_step()
        target = work.target(step)
        work.pending.change(step=step, path=target.shown)
        image = None if content is None else make_image(content)
        job = Job(
            number=work.number,
            step=step,
            format=work.opened.format if content is None else "whole_file",
            target=str(target.root / str(step) if target.file is None else target.file),
            base=str(target.base),
            root=str(target.root),
            slot=work.slot.number if image is None else image.number,
            plan=work.opened.plan,
            tag=work.opened.writer.job_tag(work.number),
            keep=target.keep,
            replace_all=target.replace_all,
            siblings=target.siblings,
            file_bytes=None if content is None else len(content),
            manifest=work.manifest | {"step": step, "run": work.opened.writer.run},
            ranking=asdict(work.ranking),
            full_every=self._options.full_every,
            retry_seconds=self._options.retry_seconds,
        )
        if image is not None:
            work.opened.writer.add_slot(image)
        work.opened.writer.submit(job, lambda outcome: self._take_outcome(work, outcome, image), work.attachments)
        work.pending.mark_submitted()

    # ------------------------------------------------------------------------------------------------- reports

    def poll(self) -> None:
        """Takes reports in without blocking, and passes a failure on as `on_error` says.

        Raises:
            SaveFailed: an earlier save failed; each failure is raised once.
        """
        if self._reports.pending and self._opened is not None:
            self._opened.writer.collect()
        lifecycle.close_abandoned()
        self.raise_failures()

    def raise_failures(self) -> None:
        """Passes a failure on as `on_error` says; see `poll`."""
        try:
            self._reports.pass_on()
        finally:
            self._retire_if_finished()

    def wait(self, timeout: float | None) -> None:
        """Waits until all saves are durable.

        Raises:
            SaveFailed: one could not be made durable.
            SaveTimeout: `timeout` seconds ran out.
        """
        if not self.wait_all(timeout):
            raise self._reports.describe_timeout(timeout)
        self.raise_failures()

    def wait_all(self, timeout: float | None) -> bool:
        """Waits until no save is pending; returns whether that was reached within `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for pending in self._reports.pending:
            if not self._wait(pending, None if deadline is None else max(0.0, deadline - time.monotonic())):
                return False
        return True

    def wait_for(self, pending: PendingSave, timeout: float | None) -> None:
        """Waits until one save is durable, and raises what `PendingSave.wait` raises."""
        if not self._wait(pending, timeout):
            raise self._reports.describe_timeout(timeout, pending)
        if pending.error is not None:
            self._reports.forget_failure(pending.error)
            raise pending.error

    def _wait(self, pending: PendingSave, timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not pending.done():
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not pending.wait_until_submitted(remaining):
                return False
            self._advance(remaining, until=pending.done)
            if remaining == 0:
                return pending.done()
        return True

    def _advance(self, timeout: float | None = None, *, until: Callable[[], bool]) -> None:
        """Waits for reports, or for a transfer from the device that has to come first."""
        opened = self._opened
        if opened is None:  # another thread has taken the last report in, and closed
            return
        waiting = next(iter(self._reports.pending), None)
        if waiting is not None and not waiting.wait_until_submitted(timeout):
            return
        opened.writer.collect(3600.0 if timeout is None else timeout, until)

    def _take_outcome(self, work: _Work, outcome: Outcome, image: Slot | None = None) -> None:
        failure = self._reports.take_in(work.number, outcome, work.started)
        if image is not None:
            work.opened.writer.drop_slot(image)
            image.close()
        work.opened.pool.release(work.slot)
        work.pending.settle(failure)
        on_durable = self._on_durable()
        if failure is None and on_durable is not None:
            on_durable(work.pending)


@dataclass(frozen=True)
class _Work:
    """One save between snapshot and outcome."""

    number: int
    opened: _Opened
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
