"""The engine: joins snapshot, slots and writer for one state at a time, and keeps count.

The training thread calls it. It knows arrays and targets, not Keras.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from offstep import _native, writer
from offstep.buffers import Slot, SlotPool
from offstep.errors import SaveFailed, SaveTimeout, WriterDied
from offstep.formats import FORMATS
from offstep.records import Job, Leaf, PathKey, SaveStats
from offstep.rendering import Rendering, make_image, read_arrays
from offstep.snapshot import Array, Mode, Snapshotter

OnBusy = Literal["wait", "skip"]
OnError = Literal["raise", "warn"]

_KEPT_STATS = 100_000
_MOST_COPY_THREADS = 256  # that the native module takes


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


@dataclass(frozen=True)
class Options:
    """How an engine works; see `Checkpointer` for the meaning of each."""

    slots: int = 2
    on_busy: OnBusy = "wait"
    on_error: OnError = "raise"
    memory_budget: int | None = None
    copy_threads: int = 2
    snapshot_mode: Mode | None = None
    in_process: bool = False
    full_every: int | None = None

    def __post_init__(self) -> None:
        """Checks each option.

        Raises:
            ValueError: one is out of range; the message ends in what was received.
        """
        _check(isinstance(self.slots, int) and self.slots >= 1, "slots must be an integer of at least 1", self.slots)
        _check(self.on_busy in ("wait", "skip"), "on_busy must be 'wait' or 'skip'", self.on_busy)
        _check(self.on_error in ("raise", "warn"), "on_error must be 'raise' or 'warn'", self.on_error)
        budget = self.memory_budget
        is_budget = budget is None or (isinstance(budget, (int, float)) and budget > 0)
        _check(is_budget, "memory_budget must be a positive number of bytes", budget)
        threads = self.copy_threads
        is_count = isinstance(threads, int) and 1 <= threads <= _MOST_COPY_THREADS
        _check(is_count, f"copy_threads must be an integer from 1 to {_MOST_COPY_THREADS}", threads)
        every = self.full_every
        is_every = every is None or (isinstance(every, int) and every >= 1)
        _check(is_every, "full_every must be None or an integer of at least 1", every)
        modes = (None, "host", "device_copy")
        _check(self.snapshot_mode in modes, "snapshot_mode must be None, 'host' or 'device_copy'", self.snapshot_mode)


def _check(is_good: bool, rule: str, received: object) -> None:
    if not is_good:
        raise ValueError(f"{rule}. Received: {received!r}")


class PendingSave:
    """One save on its way to the disk. Any thread may ask.

    Attributes:
        note: Whatever the caller of `Engine.save` wanted to remember.
    """

    def __init__(self, engine: Engine, stats: SaveStats, note: str) -> None:
        self.note = note
        self._engine = engine
        self._stats = stats  # replaced under self._lock
        self._lock = threading.Lock()
        self._submitted = threading.Event()
        self._done = threading.Event()
        self._error: SaveFailed | None = None

    def __repr__(self) -> str:
        state = "failed" if self._error else "durable" if self.done() else "pending"
        return f"PendingSave(step={self.step}, path={self.path!r}, {state})"

    @property
    def step(self) -> int:
        """Training step of the snapshot."""
        return self._stats.step

    @property
    def path(self) -> str:
        """Where it will be found."""
        return self._stats.path

    @property
    def stats(self) -> SaveStats:
        """What it has cost so far."""
        return self._stats

    def _note(self, **changes: Any) -> None:  # fields of SaveStats
        with self._lock:
            self._stats = replace(self._stats, **changes)

    def done(self) -> bool:
        """Returns whether it is durable or has failed, as far as reports have been taken in."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> None:
        """Waits until the checkpoint is durable.

        Raises:
            SaveFailed: it could not be made durable.
            SaveTimeout: `timeout` seconds ran out; the save goes on.
        """
        if not self._engine.wait_for(self, timeout):
            raise SaveTimeout(f"step {self.step} is not durable after {timeout} s: {self.path}")
        if self._error is not None:
            self._engine.forget_failure(self._error)
            raise self._error


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


@dataclass
class Counts:
    """How many saves there were."""

    requested: int = 0
    durable: int = 0
    failed: int = 0
    skipped: int = 0


class Engine:
    """Takes snapshots of one state and has them written. One thread saves; any may wait.

    Args:
        options: How to work.
        on_durable: Called on the thread that takes reports in, once for each save that has become durable.
    """

    def __init__(self, options: Options, on_durable: Callable[[PendingSave], None] = lambda pending: None) -> None:
        self._options = options
        self._on_durable = on_durable
        self._opened: _Opened | None = None
        self._pending: dict[int, PendingSave] = {}  # by job number; written by the saving thread, emptied by any
        self._failures: deque[SaveFailed] = deque()
        self._remarks: deque[str] = deque()  # what is worth a warning, but no failure
        self._recent: deque[PendingSave] = deque(maxlen=_KEPT_STATS)
        self.counts = Counts()

    @property
    def stats(self) -> list[SaveStats]:
        """What each of the last 100,000 saves cost, oldest first."""
        return [pending.stats for pending in self._recent]

    @property
    def is_writing(self) -> bool:
        """Whether a save has not become durable yet, or failed, as far as reports have been taken in."""
        return bool(self._pending)

    @property
    def is_open(self) -> bool:
        """Whether a structure has been given."""
        return self._opened is not None

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
    ) -> None:
        """Makes plan and slots for one structure and starts the writer, all in the background where it takes long.

        An earlier structure is finished and given up first. `format` is a key of `formats.FORMATS`; `documents` is
        JSON that its `prepare` takes; `rendering` makes the files that the writer cannot make.

        Raises:
            BudgetExceeded: not even one snapshot fits into the memory budget.
            UnsupportedLeaf: a leaf that stock readers could not read back.
        """
        self.close()
        options = self._options
        plan = FORMATS[format].place(leaves, empty_nodes)
        snapshotter = Snapshotter(plan, arrays, mode=options.snapshot_mode, threads=options.copy_threads)
        pool = SlotPool(plan.slot_bytes, options.slots, budget_bytes=options.memory_budget)
        borrowed = writer.borrow_shared(in_process=options.in_process)
        for slot in pool.slots:
            borrowed.add_slot(slot)
        number = borrowed.add_plan(plan, format, documents)
        needs_thread = snapshotter.mode == "device_copy" or rendering is not None
        fetcher = ThreadPoolExecutor(1, "offstep-fetch") if needs_thread else None
        _unfinished[self] = None
        self._opened = _Opened(borrowed, format, number, snapshotter, pool, fetcher, rendering)

    def close(self) -> None:
        """Waits for all saves, then gives slots and writer back. Failures stay to be reported by `poll`."""
        if self._opened is None:
            return
        self.wait_all(None)
        opened, self._opened = self._opened, None
        if opened.fetcher is not None:
            opened.fetcher.shutdown()
        for slot in opened.pool.slots:
            opened.writer.drop_slot(slot)
        opened.writer.drop_plan(opened.plan)
        opened.pool.close()
        writer.return_shared(in_process=self._options.in_process)
        self._retire_if_finished()

    def _retire_if_finished(self) -> None:
        if self._opened is None and not self._failures:
            _unfinished.pop(self, None)

    def describe_unfinished(self) -> str:
        """Says what becomes of the saves that are still pending when nobody waits for them any longer."""
        fate = (
            "are lost" if self._opened is None or self._opened.writer.in_process else "are left to the writer process"
        )
        return f"interrupted at exit; {len(self._pending)} saves that were not durable yet {fate}"

    def take_failures(self) -> list[SaveFailed]:
        """Returns the failures that nobody has been told of, and forgets them."""
        failures = list(self._failures)
        self._failures.clear()
        return failures

    def forget_after_fork(self) -> None:
        """In a forked child: gives up the parent's slots; the next `matches` asks for slots of the child's own."""
        opened, self._opened = self._opened, None
        self._pending.clear()
        self._failures.clear()
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
        note: str = "",
        started: float | None = None,
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
            note: Kept with the pending save.
            started: `time.monotonic()` at which the caller's hook began.

        Returns:
            The pending save, or `None` when no slot was free and `on_busy="skip"`.
        """
        opened = self._opened
        assert opened is not None, "open() comes first"
        started = time.monotonic() if started is None else started
        self.counts.requested += 1
        slot, waited = self._acquire(opened)
        if slot is None:
            self.counts.skipped += 1
            return None
        stats = SaveStats(step, target(step).shown, opened.snapshotter.plan.state_bytes, 0.0, waited)
        pending = PendingSave(self, stats, note)
        number = opened.writer.next_job_number()
        work = _Work(number, opened, slot, pending, target, step_leaf, step_divisor, manifest or {}, started)
        self._pending[number] = pending
        try:
            self._start(work, arrays)
        except BaseException:
            del self._pending[number]
            opened.pool.release(slot)
            raise
        pending._note(call_seconds=time.monotonic() - started)
        self._recent.append(pending)
        return pending

    def _acquire(self, opened: _Opened) -> tuple[Slot | None, float]:
        slot = opened.pool.try_acquire()
        if slot is not None or self._options.on_busy == "skip":
            return slot, 0.0
        started = time.monotonic()
        while slot is None:
            self._advance(until=lambda: opened.pool.has_free)
            slot = opened.pool.try_acquire()
        return slot, time.monotonic() - started

    def _start(self, work: _Work, arrays: Sequence[Array]) -> None:
        opened = work.opened
        if opened.snapshotter.mode == "device_copy":
            self._queue(work, opened.snapshotter.copy_on_device(arrays))
            return
        opened.snapshotter.take(arrays, work.slot)
        if opened.rendering is None or (opened.rendering.is_settled and self._is_queue_empty(work)):
            self._submit(work)
        else:
            self._queue(work, None)

    def _is_queue_empty(self, work: _Work) -> bool:
        # Saves must reach the writer in their order: two may have one target.
        return all(pending._submitted.is_set() for pending in list(self._pending.values()) if pending != work.pending)

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
            work.pending._submitted.set()

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
            self._remarks.append(f"{rendering.difference}: from now on Keras writes each file, on a thread beside fit.")
        return rendering.render(arrays)

    def _submit(self, work: _Work, content: bytes | None = None) -> None:
        step = work.pending.step if work.step_leaf is None else work.read_step()
        target = work.target(step)
        work.pending._note(step=step, path=target.shown)
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
            manifest=work.manifest | {"step": step},
            full_every=self._options.full_every,
        )
        if image is not None:
            work.opened.writer.add_slot(image)
        work.opened.writer.submit(job, lambda outcome: self._take_outcome(work, outcome, image))
        work.pending._submitted.set()

    # ------------------------------------------------------------------------------------------------- reports

    def poll(self) -> None:
        """Takes reports in without blocking, and passes a failure on as `on_error` says.

        Raises:
            SaveFailed: an earlier save failed; each failure is raised once.
        """
        if self._pending and self._opened is not None:
            self._opened.writer.collect()
        self._pass_on_failures()

    def wait_all(self, timeout: float | None) -> bool:
        """Waits until no save is pending; returns whether that was reached within `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for pending in list(self._pending.values()):
            if not self.wait_for(pending, None if deadline is None else max(0.0, deadline - time.monotonic())):
                return False
        return True

    def wait_for(self, pending: PendingSave, timeout: float | None) -> bool:
        """Waits until one save is durable or has failed; returns whether that was reached within `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not pending.done():
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                return False
            if not pending._submitted.wait(remaining):
                return False
            self._advance(remaining, until=pending.done)
        return True

    def raise_failures(self) -> None:
        """Passes a failure on as `on_error` says; see `poll`."""
        self._pass_on_failures()

    def forget_failure(self, error: SaveFailed) -> None:
        """Takes a failure off the list, because the caller is about to raise it."""
        if error in self._failures:
            self._failures.remove(error)

    def _advance(self, timeout: float | None = None, *, until: Callable[[], bool]) -> None:
        """Waits for reports, or for a transfer from the device that has to come first."""
        assert self._opened is not None
        waiting = next((pending for pending in list(self._pending.values()) if not pending.done()), None)
        if waiting is not None and not waiting._submitted.wait(timeout):
            return
        self._opened.writer.collect(3600.0 if timeout is None else timeout, until)

    def _take_outcome(self, work: _Work, outcome: writer.Outcome, image: Slot | None = None) -> None:
        pending = self._pending.pop(work.number)
        error = outcome.get("error")
        if error is None:
            seconds = outcome["durable_at"] - work.started
            costs = {name: outcome[name] for name in ("cpu_seconds", "written_bytes")}
            pending._note(durable_seconds=seconds, **costs)
            self.counts.durable += 1
            if "remark" in outcome:
                self._remarks.append(outcome["remark"])
        else:
            pending._note(error=error)
            self.counts.failed += 1
            pending._error = _failure(pending, outcome)
            self._failures.append(pending._error)
        if image is not None:
            work.opened.writer.drop_slot(image)
            image.close()
        work.opened.pool.release(work.slot)
        pending._done.set()
        if error is None:
            self._on_durable(pending)

    def _pass_on_failures(self) -> None:
        while self._remarks:
            warnings.warn(self._remarks.popleft(), RuntimeWarning, stacklevel=3)
        while self._failures:
            failure = self._failures.popleft()
            self._retire_if_finished()
            if self._options.on_error == "raise":
                raise failure
            warnings.warn(str(failure), RuntimeWarning, stacklevel=3)


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
    started: float

    def read_step(self) -> int:
        """Returns the step that the snapshot itself holds."""
        assert self.step_leaf is not None
        layout = self.opened.snapshotter.plan.leaves[self.step_leaf]
        count = self.slot.buffer[layout.offset : layout.offset + layout.chunk_bytes]
        return int.from_bytes(count, "little") // self.step_divisor


_unfinished: dict[Engine, None] = {}
"""Engines that are open, or have failures that nobody has been told of; a dict, so that they keep their order."""


def _finish_at_exit() -> None:
    """Waits for all that was submitted; failures that nobody has been told of are printed and fail the exit."""
    problems: list[str] = []
    try:
        for engine in list(_unfinished):
            engine.close()
    except KeyboardInterrupt:
        problems += [engine.describe_unfinished() for engine in _unfinished]
    problems += [str(failure) for engine in _unfinished for failure in engine.take_failures()]
    for problem in problems:
        print(f"offstep: {problem}", file=sys.stderr)
    if problems:
        _native.fail_exit()


def _forget_after_fork() -> None:
    for engine in _unfinished:
        engine.forget_after_fork()
    _unfinished.clear()


# JAX, imported above, has its own handler already; this one runs before it.
atexit.register(_finish_at_exit)
os.register_at_fork(after_in_child=_forget_after_fork)


def _failure(pending: PendingSave, outcome: writer.Outcome) -> SaveFailed:
    text = (
        f"step {pending.step} was not saved to {pending.path}: {outcome['error']}; "
        "checkpoints saved before it are untouched"
    )
    if outcome.get("died"):
        return WriterDied(text)
    if outcome.get("errno") is not None:
        return SaveFailed(outcome["errno"], text)
    return SaveFailed(text)
