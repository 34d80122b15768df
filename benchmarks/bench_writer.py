"""What do the writer's priority and its threads cost the training while a checkpoint is written?

    PYTHONPATH=src python benchmarks/bench_writer.py
    PYTHONPATH=src python benchmarks/bench_writer.py --quick --dir /tmp/somewhere

A jitted step that keeps all cores busy is timed with and without a write in flight. The settings take turns, each with
a writer process of its own: niceness and policy with two writes in flight, then the usual ones with 1 and 4.
Inflation is the median step during a write over the median step without one; cost is what all steps of a write took
longer together, call included, so a slow write does not look cheap. Both matter beside the time until durable.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
from command import DEFAULT_DIRECTORY
from machine import describe_machine
from rich.console import Console
from rich.table import Table

from offstep import Checkpointer, SaveTimeout, writer_process
from offstep.formats import orbax_step

# Beside the constants of the package, which are what this measures: a writer process takes them from here.
_START = (
    "import os, sys; sys.path[:] = {{path!r}}\n"
    "from offstep import worker\n"
    "from offstep.formats import orbax_step\n"
    "worker.PROCESS_NICENESS = {niceness}\n"
    "orbax_step._IO_THREADS = {io_threads}\n"
    "os.sched_setscheduler(0, os.{policy}, os.sched_param(0))\n"
    "worker.main()"
)


@dataclass(frozen=True)
class Setting:
    """How the writer process runs."""

    niceness: int
    policy: str
    io_threads: int

    @property
    def label(self) -> str:
        return f"nice {self.niceness}, {self.policy}, {self.io_threads} in flight"


@dataclass
class Times:
    """What steps and saves took, in seconds."""

    free: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    durable: list[float] = field(default_factory=list)


SETTINGS = (
    *(Setting(niceness, "SCHED_OTHER", 2) for niceness in (0, 5, 10, 19)),
    Setting(5, "SCHED_BATCH", 2),
    Setting(19, "SCHED_BATCH", 2),
    Setting(5, "SCHED_IDLE", 2),
    *(Setting(5, "SCHED_OTHER", io_threads) for io_threads in (1, 4)),
)
State = dict[str, jax.Array]


def make_step(width: int) -> tuple[Callable[[], None], float]:
    """Returns a step that computes on all cores, and its time."""
    weights = jnp.ones((width, width)) / width
    compute = jax.jit(lambda x: x @ weights)
    x = jnp.ones((width, width))
    jax.block_until_ready(compute(x))

    def step() -> None:
        jax.block_until_ready(compute(x))

    return step, statistics.median(_timed(step) for _ in range(9))


def make_state(megabytes: int) -> State:
    """Returns 40 float32 arrays of together that many MB."""
    return {f"leaf{number}": jnp.full((250_000 * megabytes // 40,), number, jnp.float32) for number in range(40)}


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(setting: Setting, step: Callable[[], None], state: State, directory: Path, saves: int, into: Times) -> None:
    """Adds the times of some saves by a writer with this setting; its first save is not counted."""
    usual, writer_process._START = writer_process._START, _START.format(**vars(setting))
    try:
        with Checkpointer(directory, max_to_keep=1) as checkpointer:
            checkpointer.save(0, state)
            checkpointer.wait()
            for number in range(1, saves + 1):
                free = [_timed(step) for _ in range(10)]
                into.free += free
                _save(checkpointer, number, step, state, statistics.median(free), into)
    finally:
        writer_process._START = usual


def _save(
    checkpointer: Checkpointer, number: int, step: Callable[[], None], state: State, free: float, into: Times
) -> None:
    call = _timed(lambda: checkpointer.save(number, state))
    busy = []
    while not _is_durable(checkpointer):
        busy.append(_timed(step))
    into.calls.append(call)
    into.busy += busy
    into.costs.append(call + sum(busy) - len(busy) * free)
    into.durable.append(checkpointer.stats[-1].durable_seconds or 0.0)


def _is_durable(checkpointer: Checkpointer) -> bool:
    try:
        checkpointer.wait(0)
    except SaveTimeout:
        return False
    return True


def print_times(console: Console, times: dict[Setting, Times]) -> None:
    """Prints one row per setting, with the spread of the costs."""
    table = Table(
        "writer", "step free\nms", "step during\na write, ms", "inflation", "call, ms", "cost, ms", "durable, ms"
    )
    for setting, taken in times.items():
        free, busy = statistics.median(taken.free), statistics.median(taken.busy or taken.free)
        costs = f"{1e3 * min(taken.costs):.0f}..{1e3 * max(taken.costs):.0f}"
        table.add_row(
            setting.label,
            f"{1e3 * free:.1f}",
            f"{1e3 * busy:.1f}",
            f"{busy / free - 1:+.1%}",
            f"{1e3 * statistics.median(taken.calls):.1f}",
            f"{1e3 * statistics.median(taken.costs):.0f} ({costs})",
            f"{1e3 * statistics.median(taken.durable):.0f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little state, one save each: does everything work?")
    parser.add_argument("--repeats", type=int, default=3, help="turns of all settings (%(default)s)")
    parser.add_argument("--megabytes", type=int, default=600, help="size of the state (%(default)s)")
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIRECTORY, help="where checkpoints go (%(default)s)")
    arguments = parser.parse_args()
    megabytes, saves, repeats = (40, 1, 1) if arguments.quick else (arguments.megabytes, 5, arguments.repeats)
    assert hasattr(orbax_step, "_IO_THREADS"), "the writer would ignore the number of threads"
    arguments.dir.mkdir(parents=True, exist_ok=True)
    console = Console(width=160, highlight=False)
    machine = describe_machine(arguments.dir)
    step, seconds = make_step(256 if arguments.quick else 1024)
    state = make_state(megabytes)
    console.print(f"{machine['cpu']}, {machine['cores']} cores; checkpoints on {machine['file_system']}")
    console.print(f"{megabytes} MB in 40 arrays, steps of {1e3 * seconds:.1f} ms, {repeats} x {saves} saves a setting")
    times = {setting: Times() for setting in SETTINGS}
    for repeat in range(repeats):
        shift = repeat * len(SETTINGS) // repeats
        for setting in (*SETTINGS[shift:], *SETTINGS[:shift]):
            with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
                measure(setting, step, state, Path(directory), saves, times[setting])
            os.sync()
    print_times(console, times)


if __name__ == "__main__":
    main()
