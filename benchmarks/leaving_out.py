"""A writer process that leaves out what makes a checkpoint safe, so that its cost can be measured. For nothing else.

A peer installs it; the writer finds in its environment what to leave out, by name in `PARTS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from offstep import catalog, disk, manifest, worker, writer_process
from offstep.formats import orbax_step

_VARIABLE = "BENCHMARK_LEAVES_OUT"


def install(names: Iterable[str]) -> None:
    """In the trainer, before its writer starts."""
    os.environ[_VARIABLE] = " ".join(names)
    writer_process.entry = __name__


def main() -> None:
    """In the writer process, in the place of `offstep.worker.main`."""
    for name in os.environ[_VARIABLE].split():
        PARTS[name]()
    worker.main()


def _leave_out_count() -> None:
    @contextmanager
    def counted_beside(slot: memoryview, table: bytes) -> Iterator[Callable[[], int]]:
        yield lambda: 0

    assert hasattr(orbax_step, "counted_beside"), "the writer would count all the same"
    orbax_step.counted_beside = counted_beside


def _leave_out_checks() -> None:
    def record_files(files: Mapping[str, object]) -> dict[str, manifest.FileRecord]:
        return {}

    def find_fault(checkpoint: object) -> None:
        return None

    assert hasattr(manifest, "record_files"), "the writer would compute checksums all the same"
    assert hasattr(catalog, "find_fault"), "the writer would look at sizes all the same"
    manifest.record_files, catalog.find_fault = record_files, find_fault  # type: ignore[assignment]


def _leave_out_directory_fsyncs() -> None:
    def pretend(descriptor: int) -> None:
        pass

    disk.calls = replace(disk.calls, fsync_directory=pretend, fsync_parent=pretend)


PARTS: dict[str, Callable[[], None]] = {
    "count": _leave_out_count,  # of values that are NaN or infinite
    "checks": _leave_out_checks,  # the files' checksums in the manifest, and the look at their sizes before others go
    "directory_fsyncs": _leave_out_directory_fsyncs,
}
