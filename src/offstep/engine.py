"""The engine: joins snapshot, slots and writer for one state at a time, and keeps count.

The training thread calls it. It knows arrays and targets, not Keras.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from offstep import lifecycle, ownership, resources, shared_writer, waiting
from offstep.arrays import Array
from offstep.attachments import Attachment
from offstep.buffers import Slot
from offstep.errors import SaveFailed
from offstep.formats import FORMATS
from offstep.keeping import Keeper
from offstep.options import Options
from offstep.ownership import Lock
from offstep.pending import PendingSave
from offstep.processes import find_membership
from offstep.records import Leaf, PathKey, SaveStats, Target
from offstep.rendering import Rendering
from offstep.reports import Counts, Reports
from offstep.retention import Ranking
from offstep.signals import held_signals
from offstep.snapshot import Snapshotter
from offstep.submission import OnDurable, Opened, Submitter, Work


class Engine:
    """Takes snapshots of one state and has them written. One thread saves; any may wait.

    Args:
        options: How to work.
        on_durable: Called on the thread that takes reports in, once for each save that has become durable; a method
            only while its object lives.
    """

    def __init__(self, options: Options, on_durable: OnDurable | None = None) -> None:
        self._options = options
        self._opened: Opened | None = None
        self._reports = Reports(options.on_error)
        self._submitter = Submitter(options, self._reports, on_durable)
        self._keeper = Keeper(options, self._reports)
        self._tie: weakref.finalize[..., object] | None = None

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self._options, self._submitter.on_durable)  # a copy of a callback saves for itself

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
        hold: Callable[[], Lock] | None = None,
    ) -> None:
        """Makes plan and slots for one structure; `make_ready` says that they will be used.

        An earlier structure is finished and given up first. `format` is a key of `formats.FORMATS`; `documents` is
        JSON that its `prepare` takes; `rendering` makes the files that the writer cannot make. When `owner` is gone
        without a `close`, the engine is closed for it once its saves are done. `hold` takes the lock of the target,
        which is given back with `close`.

        Raises:
            BudgetExceeded: not even one snapshot fits into the memory budget.
            UnsupportedLeaf: a leaf that stock readers could not read back.
            TargetInUse: another live run saves there.
        """
        with ExitStack() as undo:
            membership = find_membership(leaves, arrays, format, empty_nodes, self._options)
            has_lock = membership is None or membership.has_lock
            # First: where it is the same one, nobody gets in between.
            lock = hold() if hold is not None and has_lock else None
            if lock is not None:
                undo.callback(ownership.release, lock)
            self.close()
            lifecycle.check_is_running()
            lifecycle.close_abandoned()  # before a budget is taken of what memory there is
            plan = FORMATS[format].place(leaves, empty_nodes) if membership is None else membership.plan
            options = self._options
            snapshotter = Snapshotter(plan, arrays, mode=options.snapshot_mode, threads=options.copy_threads)
            with held_signals():
                self._opened = resources.borrow(snapshotter, options, format, documents, rendering, lock, membership)
                lifecycle.add(self)
                self._tie = None if owner is None else lifecycle.tie(self, owner)
            undo.pop_all()

    @property
    def is_ready(self) -> bool:
        """Whether `make_ready` was called since `open`."""
        return self._opened is not None and self._opened.is_ready

    def make_ready(self) -> None:
        """Starts the writer, and touches the slots beside training, so that the first save finds them warm.

        The first `save` does it if nobody else has. Does nothing before `open`.
        """
        if self._opened is None or self._opened.is_ready:
            return
        with held_signals():
            self._opened.is_ready = True
            self._opened.pool.touch()
            self._opened.writer.start()

    def close(self) -> None:
        """Waits for all saves, then gives slots and writer back. Failures stay to be reported by `poll`.

        A snapshot that is still kept in memory is saved: the training has not ended as it should.
        """
        if self._opened is None:
            return
        self._save_kept()
        self.wait_all(None)
        with held_signals():  # half closed, it would keep its slots to the end of the process
            opened, self._opened = self._opened, None
            if self._tie is not None:
                self._tie.detach()
            resources.give_back(opened)
            self._retire_if_finished()
        shared_writer.return_shared(in_process=self._options.in_process)
        lifecycle.close_abandoned()  # the writer works in order: what they submitted before us is done

    def close_if_idle(self) -> bool:
        """Closes it unless a save is pending; never waits for one; returns whether it is closed."""
        self._save_kept()
        if self._opened is not None:
            self._opened.collect()
        if not self._reports.pending and not self._reports.uploading:
            self.close()
        return self._opened is None

    def _retire_if_finished(self) -> None:
        if self._opened is None and not self._reports.has_untold:
            lifecycle.remove(self)

    def finish(self, within_seconds: float) -> bool:
        """Closes it if its saves are done within the time, or within its `exit_seconds`; returns whether it did."""
        self._save_kept()
        if not self.wait_all(min(within_seconds, self._options.exit_seconds)):
            return False
        self.close()
        return True

    @property
    def retry_seconds(self) -> float:
        """How long a store may fail before that is an error."""
        return self._options.retry_seconds

    @property
    def exit_seconds(self) -> float:
        """How long the end of the process waits for the saves."""
        return self._options.exit_seconds

    def describe_unfinished(self) -> str:
        """Says what becomes of the saves that are still pending when nobody waits for them any longer."""
        count = len(self._reports.pending) + len(self._reports.uploading)
        opened = self._opened
        is_lost = opened is None or opened.writer.in_process or opened.fetcher is not None or opened.joint is not None
        fate = "may be lost" if is_lost else "are left to the writer process"
        return f"{count} saves that were not durable yet {fate}" if count else ""

    def take_failures(self) -> list[SaveFailed]:
        """Returns the failures that nobody has been told of, and forgets them."""
        return self._reports.take_failures()

    def forget_after_fork(self) -> None:
        """In a forked child: gives up the parent's slots; the next `matches` asks for slots of the child's own."""
        opened, self._opened = self._opened, None
        self._keeper.forget_after_fork()
        self._reports.forget_pending()
        if opened is not None:
            opened.pool.abandon()

    # -------------------------------------------------------------------------------------------------- saving

    @property
    def writes_common(self) -> bool:
        """Whether this process writes what a checkpoint has once; of several that write one together, one does."""
        return self._opened is None or self._opened.joint is None or self._opened.joint.writes_common

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
        must_save: bool = False,
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
            must_save: Wait for a slot whatever `on_busy` says.

        Returns:
            The pending save, or `None` when it was skipped: no slot was free (`on_busy="skip"`), or none was to be
            had (`"latest"`: each is being written, or filled from a device).
        """
        opened = self._opened
        assert opened is not None, "open() comes first"
        started = time.monotonic() if started is None else started
        self.counts.requested += 1
        opened.writer.start()  # here, because nobody hears what the fetching thread would warn of
        waited = self._wait_for_slot(opened, must_save=must_save)
        compute_seconds += waiting.wait_until_computed(opened.snapshotter, arrays)
        state_bytes = opened.snapshotter.plan.state_bytes
        stats = SaveStats(step, target(step).shown, state_bytes, 0.0, waited, compute_seconds=compute_seconds)
        pending = PendingSave(stats, note, self)
        with held_signals():  # Ctrl-C in here would leave a slot that nobody gives back, or tear what is in it
            slot = opened.pool.try_acquire() or self._replace_oldest(opened)
            if slot is not None:
                work = Work(
                    opened.writer.next_job_number(),
                    opened,
                    slot,
                    pending,
                    target,
                    started,
                    step_leaf,
                    step_divisor,
                    manifest,
                    attachments,
                    ranking,
                )
                self._submitter.hand_over(work, arrays)
            pending.change(call_seconds=time.monotonic() - started)
            self._reports.keep(pending)
            if slot is None:
                self._reports.skip(pending)
        self.make_ready()  # after the copy, with which the touching would compete
        return None if slot is None else pending

    def keep(
        self,
        arrays: Sequence[Array],
        step: int,
        target: Callable[[int], Target],
        *,
        attachments: Callable[[], Mapping[str, Attachment]] = dict,
        **about: Any,
    ) -> bool:
        """Takes a snapshot that is kept in memory in place of the one before, and written only if this process dies.

        Never waits for a slot. The arguments are those of `save`, of which `about` may have `step_leaf`,
        `step_divisor`, `manifest` and `ranking`; `attachments` is called only if a snapshot is taken.

        Returns:
            Whether it was taken: a slot was free, and none is on its way from the device.
        """
        opened = self._opened
        assert opened is not None, "open() comes first"
        if self._keeper.is_busy or not opened.pool.has_free:
            return False
        started = time.monotonic()
        waiting.wait_until_computed(opened.snapshotter, arrays)
        pending = PendingSave(SaveStats(step, "", opened.snapshotter.plan.state_bytes, 0.0, 0.0), "", self)
        about["attachments"] = attachments()
        with held_signals():
            slot = opened.pool.try_acquire()
            if slot is not None:
                number = opened.writer.next_job_number()
                self._keeper.keep(Work(number, opened, slot, pending, target, started, **about), arrays)
        self.make_ready()
        return slot is not None

    def forget_kept(self) -> None:
        """Gives up the snapshot that is kept in memory: the training has ended well."""
        self._keeper.forget()

    def _save_kept(self) -> None:
        work = self._keeper.take()
        if work is not None:
            with held_signals():
                self.counts.requested += 1
                self._reports.expect(work.number, work.pending)
                self._reports.keep(work.pending)
                self._submitter.submit(work)

    def _wait_for_slot(self, opened: Opened, *, must_save: bool) -> float:
        """Waits where `on_busy` says so, and returns how many seconds."""
        started = time.monotonic()
        if self._options.on_busy != "wait" and not must_save:
            return 0.0
        if opened.pool.has_free:
            return 0.0
        while not opened.pool.has_free:
            waiting.advance(self._reports, self._find_opened, until=lambda: opened.pool.has_free)
        return time.monotonic() - started

    def _replace_oldest(self, opened: Opened) -> Slot | None:
        """Takes the slot of the oldest snapshot that nobody has begun to write; `None` where there is none.

        The oldest: with three slots or more, a newer one stays submitted if this process is killed meanwhile.
        """
        if self._options.on_busy != "latest":
            return None
        opened.writer.collect()
        if not opened.pool.has_free:
            any(opened.writer.withdraw(number) for number in self._reports.pending_numbers)
        return opened.pool.try_acquire()

    # ------------------------------------------------------------------------------------------------- reports

    def poll(self) -> None:
        """Takes reports in without blocking, and passes a failure on as `on_error` says.

        Raises:
            SaveFailed: an earlier save failed; each failure is raised once.
        """
        if (self._reports.pending or self._reports.uploading) and self._opened is not None:
            self._opened.collect()
        lifecycle.close_abandoned()
        self.raise_failures()

    def raise_failures(self) -> None:
        """Passes a failure on as `on_error` says; see `poll`."""
        try:
            self._reports.pass_on()
        finally:
            self._retire_if_finished()

    def _find_opened(self) -> Opened | None:
        return self._opened  # another thread that waits may close it

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
        return waiting.wait_for_all(self._reports, self._find_opened, timeout)

    def wait_for(self, pending: PendingSave, timeout: float | None) -> None:
        """Waits until one save is durable, and raises what `PendingSave.wait` raises."""
        if not waiting.wait_for_one(pending, self._reports, self._find_opened, timeout):
            raise self._reports.describe_timeout(timeout, pending)
        if pending.error is not None:
            self._reports.forget_failure(pending.error)
            raise pending.error
