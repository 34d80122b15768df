"""Where does the time until a checkpoint is durable go, and what would the disk alone take beside the same training?

    python benchmarks/bench_phases.py
    python benchmarks/bench_phases.py --quick --dir /tmp/somewhere

Saves take turns with plain direct writes of the same bytes (one fsync), each with idle cores and beside a step that
keeps all of them busy. Of a save it says what the training thread took, what passed before the writer began, the calls
to the disk that the writer made (fsyncs of several files overlap, so their sum may exceed what they took), and the rest
of its work. All are medians; the ratio is that of the medians, and beside it that to the fastest write, which is
what the tables of the other benchmarks mean by "of a direct write".
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timed_writer
from bench_writer import make_state, make_step
from bounds import write_once
from command import DEFAULT_DIRECTORY
from machine import describe_machine

from offstep import Checkpointer

Times = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little state, one turn: does everything work?")
    parser.add_argument("--repeats", type=int, default=15, help="turns of all (%(default)s)")
    parser.add_argument("--megabytes", type=int, default=600, help="size of the state (%(default)s)")
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIRECTORY, help="where checkpoints go (%(default)s)")
    arguments = parser.parse_args()
    megabytes, repeats = (40, 1) if arguments.quick else (arguments.megabytes, arguments.repeats)
    arguments.dir.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(arguments.dir)
    print(f"{machine['cpu']}, {machine['cores']} cores; checkpoints on {machine['file_system']}")
    print(f"{megabytes} MB in 40 arrays, {repeats} turns")
    step, _ = make_step(256 if arguments.quick else 1024)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
        for name, times in measure(Path(directory), megabytes, repeats, step).items():
            show(name, times)


def measure(directory: Path, megabytes: int, repeats: int, step: Callable[[], None]) -> dict[str, Times]:
    """Returns the times in seconds by circumstance and phase."""
    log = directory / "calls"
    timed_writer.install(log)
    state = make_state(megabytes)
    found: dict[str, Times] = {"idle cores": defaultdict(list), "beside training": defaultdict(list)}
    with Checkpointer(directory / "run", max_to_keep=1) as checkpointer:
        for number in range(3):  # the first ones touch the slots and start the writer
            checkpointer.save(number, state)
            checkpointer.wait()
        for number in range(3, 3 + 2 * repeats, 2):
            for shift, (name, times) in enumerate(found.items()):
                with kept_busy(step if name == "beside training" else None):
                    for writers in (1, 2):
                        seconds = write_once(1_000_000 * megabytes, directory, writers)
                        times[f"direct write, {writers} in flight"].append(seconds)
                    log.write_text("")
                    checkpointer.save(number + shift, state)
                    checkpointer.wait()
                add_phases(times, checkpointer, log)
    return found


@contextmanager
def kept_busy(step: Callable[[], None] | None) -> Iterator[None]:
    """Runs the step again and again on a thread; without one nothing runs."""
    has_ended = threading.Event()

    def train() -> None:
        while step and not has_ended.is_set():
            step()

    thread = threading.Thread(target=train)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


def add_phases(times: Times, checkpointer: Checkpointer, log: Path) -> None:
    """Adds where the last save's time went; the deletion of the one before it comes after and does not count."""
    stats = checkpointer.stats[-1]
    assert stats.durable_seconds is not None
    assert stats.write_seconds is not None
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    durable = [name for name, _ in calls].index("fsync_parent") + 1
    of_disk: dict[str, float] = defaultdict(float)
    for name, seconds in calls[:durable]:
        of_disk[name] += seconds
    times["durable"].append(stats.durable_seconds)
    times["- call"].append(stats.call_seconds)
    times["- from call to writer and back"].append(stats.durable_seconds - stats.call_seconds - stats.write_seconds)
    times["- writer"].append(stats.write_seconds)
    for name in ("write", "fsync_file", "fsync_directory", "rename", "fsync_parent"):
        times[f"  - {name}"].append(of_disk[name])


def show(name: str, times: Times) -> None:
    """Prints the medians and spreads, and the ratios."""
    print(f"\n{name}")
    for phase, seconds in times.items():
        taken = sorted(1e3 * one for one in seconds)
        print(f"  {phase:32} {statistics.median(taken):7.1f} ms ({taken[0]:.1f}..{taken[-1]:.1f})")
    writes = [times[phase] for phase in times if phase.startswith("direct")]
    durable = statistics.median(times["durable"])
    usual = min(map(statistics.median, writes))
    fastest = min(map(min, writes))
    print(f"  durable / direct write: {durable / usual:.2f} of the median, {durable / fastest:.2f} of the fastest")


if __name__ == "__main__":
    main()
