"""How many bytes does a save write when almost nothing of the state changes (LoRA)?

    PYTHONPATH=src python benchmarks/bench_frozen.py
    PYTHONPATH=src python benchmarks/bench_frozen.py --quick --dir /tmp/somewhere

Workload L has 99 % frozen weights. offstep's own count (`SaveStats.written_bytes`) stands beside what the kernel counts
for the writer process in `/proc/<pid>/io`: bytes handed to write calls, and bytes sent to the disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import psutil
from command import DEFAULT_DIRECTORY
from workloads import WORKLOADS, Workload, build, shrink

from offstep import ModelCheckpoint


@dataclass(frozen=True)
class Saved:
    """What one save has written, by three counts, and its time until durable from when the state was computed."""

    own_bytes: int
    called_bytes: int
    disk_bytes: int
    durable_seconds: float


class Count(keras.callbacks.Callback):
    """Waits for each save of another callback and reads the kernel's counters of its writer."""

    def __init__(self, checkpoint: ModelCheckpoint) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.saves: list[Saved] = []
        self._before = (0, 0)

    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self.checkpoint.wait_until_finished()
        counters = self._read()
        if len(self.checkpoint.stats) > len(self.saves):
            stats = self.checkpoint.stats[-1]
            called, disk = (after - before for after, before in zip(counters, self._before, strict=True))
            seconds = (stats.durable_seconds or 0.0) - stats.compute_seconds
            self.saves.append(Saved(stats.written_bytes or 0, called, disk, seconds))
        self._before = counters

    def _read(self) -> tuple[int, int]:
        for child in psutil.Process().children():
            if any("offstep.worker" in text for text in child.cmdline()):
                counters = child.io_counters()
                return counters.write_chars, counters.write_bytes
        return 0, 0


def measure(workload: Workload, directory: Path, *, skip_unchanged: bool) -> list[Saved]:
    """Trains once and returns what each save has written; the first one writes everything."""
    model, samples = build(workload, 0)
    checkpoint = ModelCheckpoint(
        directory / "{step}", save_freq=workload.save_freq, max_to_keep=2, skip_unchanged=skip_unchanged
    )
    count = Count(checkpoint)
    model.fit(samples, samples, batch_size=workload.batch, shuffle=False, verbose=0, callbacks=[checkpoint, count])
    return count.saves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few saves: does everything work?")
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIRECTORY, help="where checkpoints go (%(default)s)")
    arguments = parser.parse_args()
    workload = shrink(WORKLOADS["L"]) if arguments.quick else WORKLOADS["L"]
    arguments.dir.mkdir(parents=True, exist_ok=True)
    print(f"{workload.question}: {workload.state_bytes / 1e6:.1f} MB in {workload.state_variables:,} variables")
    for skip_unchanged in (False, True):
        with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
            first, *later = measure(workload, Path(directory), skip_unchanged=skip_unchanged)
        print(f"skip_unchanged={skip_unchanged}: first save {_describe(first, workload)}")
        print(f"  each of {len(later)} later saves, median: {_describe(_median(later), workload)}")


def _median(saves: list[Saved]) -> Saved:
    rows = [(save.own_bytes, save.called_bytes, save.disk_bytes, save.durable_seconds) for save in saves]
    own, called, disk, seconds = (statistics.median(column) for column in zip(*rows, strict=True))
    return Saved(int(own), int(called), int(disk), seconds)


def _describe(saved: Saved, workload: Workload) -> str:
    return (
        f"{saved.own_bytes / 1e6:.2f} MB = {saved.own_bytes / workload.state_bytes:.2%} of the state "
        f"(kernel: {saved.called_bytes / 1e6:.2f} MB in write calls, {saved.disk_bytes / 1e6:.2f} MB to the disk), "
        f"durable after {1e3 * saved.durable_seconds:.0f} ms"
    )


if __name__ == "__main__":
    main()
