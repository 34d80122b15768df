"""Keeps the newest snapshot in memory, so that a trainer that dies loses next to nothing."""

from __future__ import annotations

from collections.abc import Sequence

from offstep.arrays import Array
from offstep.options import Options
from offstep.reports import Reports
from offstep.submission import Work, describe_job


class Keeper:
    """Takes snapshots that nobody writes while the trainer lives; the writer makes the newest durable if it dies.

    The training thread calls it, unless said otherwise. A snapshot that is kept has its slot until a newer one is.

    Args:
        options: How to work.
        reports: Is told what could not be kept.
    """

    def __init__(self, options: Options, reports: Reports) -> None:
        self._options, self._reports = options, reports
        self._kept: Work | None = None
        self._coming: Work | None = None  # on its way from the device

    @property
    def is_busy(self) -> bool:
        """Whether a snapshot is on its way from the device: then another one is not worth a slot."""
        return self._coming is not None

    def keep(self, work: Work, arrays: Sequence[Array]) -> None:
        """Takes a snapshot into a slot, which it gives back after the next one; an error leaves the slot free."""
        opened = work.opened
        self._coming = work
        try:
            if opened.snapshotter.mode == "device_copy":
                assert opened.fetcher is not None
                opened.fetcher.submit(self._fetch, work, opened.snapshotter.copy_on_device(arrays))
            else:
                opened.snapshotter.take(arrays, work.slot, are_computed=True)
                self._hold(work)
        except BaseException:
            self._drop(work)
            raise

    def take(self) -> Work | None:
        """Returns the snapshot that is kept, if there is one, and no longer looks after it, or its slot."""
        if self._coming is not None:
            assert self._coming.opened.fetcher is not None
            self._coming.opened.fetcher.submit(int).result()  # it does one thing after another
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.opened.writer.forget(kept.opened.plan)
        return kept

    def forget(self) -> None:
        """Gives up the snapshot that is kept: the training has ended well."""
        kept = self.take()
        if kept is not None:
            kept.opened.pool.release(kept.slot)

    def forget_after_fork(self) -> None:
        """In a forked child: it is the parent's."""
        self._kept = self._coming = None

    def _fetch(self, work: Work, private: list[Array]) -> None:
        """Runs on the fetching thread."""
        try:
            work.opened.snapshotter.fetch(private, work.slot)
            self._hold(work)
        except Exception as error:  # noqa: BLE001  the next one may succeed
            self._drop(work)
            self._reports.remark(f"a snapshot could not be kept in memory: {type(error).__name__}: {error}")

    def _hold(self, work: Work) -> None:
        step = work.pending.step if work.step_leaf is None else work.read_step()
        target = work.target(step)
        work.pending.change(step=step, path=target.shown)
        job = describe_job(work, step, target, self._options)
        work.opened.writer.keep(job, self._options.memory_linger_seconds, work.attachments or {})
        earlier, self._kept, self._coming = self._kept, work, None
        if earlier is not None:
            earlier.opened.pool.release(earlier.slot)

    def _drop(self, work: Work) -> None:
        if self._coming is work:
            self._coming = None
            work.opened.pool.release(work.slot)
