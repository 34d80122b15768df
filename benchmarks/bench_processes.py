"""What does a save by several training processes cost, beside one process and beside stock Orbax?

    python benchmarks/bench_processes.py
    python benchmarks/bench_processes.py --quick --processes 1 2

Starts that many JAX processes on this machine, each with two virtual devices. Each process holds the same number of
bytes (`--megabytes`), sharded over all. It prints the time of the call, the time to durable, messages through the
coordination service, files, and bytes of metadata; XLA programs that a save compiles; and for a small state the time to
durable of stock Orbax's asynchronous checkpointer, which takes turns with ours.

Real hosts do not share two cores, one memory and one disk as these processes do. So each save of all together takes
turns with one in which the same processes each save a state of the same size of their own, by themselves: as fast as
this machine lets so many save at all. Both are done one process after another, and all at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import DEFAULT_DIRECTORY

LEAVES = 20
KINDS = ("together", "alone")
SMALL_LEAVES, SMALL_ROWS = 50, 64
PATIENCE_SECONDS = 600
messages: Counter[str] = Counter()


@dataclass(frozen=True)
class Task:
    """What one process does.

    Attributes:
        process: Which one it is.
        count: How many there are.
        port: Of JAX's coordinator.
        directory: Where checkpoints go.
        megabytes: What each process holds.
        saves: How many saves are measured of each kind.
        with_stock: Whether stock Orbax saves too.
    """

    process: int
    count: int
    port: int
    directory: str
    megabytes: float
    saves: int
    with_stock: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--megabytes", type=float, default=32.0)
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="as few saves as show that it works")
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIRECTORY)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(measure(Task(**json.loads(options.task)))))
        return
    saves, megabytes = (2, 1.0) if options.quick else (options.saves, options.megabytes)
    options.dir.mkdir(parents=True, exist_ok=True)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {megabytes:g} MB in each process, {saves} saves")
    for count in options.processes:
        print_rows(count, run(count, options.dir, megabytes, saves))


def run(count: int, parent: Path, megabytes: float, saves: int) -> list[dict[str, Any]]:
    """Starts the processes and returns what each has measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    directory = tempfile.mkdtemp(dir=parent)
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    tasks = [Task(process, count, port, directory, megabytes, saves, count in (2, 4)) for process in range(count)]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--task", json.dumps(vars(task))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for task in tasks
    ]
    try:
        said = [process.communicate(timeout=PATIENCE_SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
        shutil.rmtree(directory)
    return [json.loads(text.splitlines()[-1]) for text in said]


def print_rows(count: int, found: list[dict[str, Any]]) -> None:
    primary = found[0]
    print(
        f"{count} processes: messages per save {sum(report['messages'] for report in found):.1f}, of the primary "
        f"{primary['messages']:.1f}; files {primary['files']}; metadata {primary['metadata_bytes']} bytes; "
        f"XLA programs compiled for saves {sum(report['compiled'] for report in found)}"
    )
    for what in ("call, in turn", "call, at once", "durable, at once"):
        together, alone = (gather(found, f"{who}: {what}") for who in KINDS)
        ratio = statistics.median(together) / statistics.median(alone)
        print(f"    {what}: {describe(together)}; each by itself {describe(alone)}: {ratio:.2f} times")
    for who in ("ours", "stock"):
        if who in primary:
            print(f"    small state, {who}: durable {describe(gather(found, who))}")


def gather(found: list[dict[str, Any]], name: str) -> list[float]:
    return [milliseconds for report in found for milliseconds in report[name]]


def describe(times: list[float]) -> str:
    return f"p50 {statistics.median(times):.2f} ms (max {max(times):.1f})"


def measure(task: Task) -> dict[str, Any]:
    """Runs in one of the processes."""
    import jax

    if task.count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{task.port}", task.count, task.process)
        count_messages()
    compiled: Counter[str] = Counter()
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.update([name]))
    trees = {"together": make_tree(task, together=True), "alone": make_tree(task, together=False)}
    meet("made", task.count)
    before = compiled["/jax/core/compile/backend_compile_duration"]
    found = measure_saves(task, trees)
    found["compiled"] = compiled["/jax/core/compile/backend_compile_duration"] - before
    if task.with_stock:
        found |= measure_small(task)
    meet("done", task.count)
    return found


def count_messages() -> None:
    from offstep.coordination import Group

    for name in ("put", "get", "peek", "delete"):
        call = getattr(Group, name)

        def counted(self: Any, *args: Any, call: Any = call, name: str = name) -> Any:
            messages[name] += 1
            return call(self, *args)

        setattr(Group, name, counted)


def meet(name: str, count: int) -> None:
    """Lets all processes wait for each other, without any device."""
    if count > 1:
        from jax._src.distributed import global_state

        global_state.client.wait_at_barrier(name, PATIENCE_SECONDS * 1000)


def make_tree(task: Task, *, together: bool) -> dict[str, Any]:
    """Returns arrays of which this process holds `megabytes`: its part, or all of a state of its own."""
    import jax
    import numpy as np

    devices = jax.devices() if together else jax.local_devices()
    columns = round(task.megabytes * 1e6 / LEAVES / 2 / 4)
    host = np.zeros((len(devices), columns), np.float32)
    return {f"leaf_{number}": spread(host, devices, sharded=True) for number in range(LEAVES)}


def spread(host: Any, devices: Any, *, sharded: bool) -> Any:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(devices), ("all",))
    sharding = NamedSharding(mesh, PartitionSpec("all") if sharded else PartitionSpec())
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def measure_saves(task: Task, trees: dict[str, Any]) -> dict[str, Any]:
    from offstep import Checkpointer

    roots = {"together": Path(task.directory, "ours"), "alone": Path(task.directory, f"alone-{task.process}")}
    found: dict[str, Any] = {f"{who}: {what}": [] for who in KINDS for what in ("call, in turn", "call, at once")}
    found |= {f"{who}: durable, at once": [] for who in KINDS}
    sent = 0
    with ExitStack() as stack:
        savers = {who: stack.enter_context(Checkpointer(roots[who], max_to_keep=2)) for who in KINDS}
        for step in range(2 * task.saves + 1):
            is_in_turn = step <= task.saves
            for who in KINDS:
                before = sum(messages.values())
                save_once(task, savers[who], trees[who], f"{who}-{step}", step, is_in_turn=is_in_turn)
                if step and who == "together":
                    sent += sum(messages.values()) - before
                if step:  # the first one starts writers, and works out who writes what
                    stats = savers[who].stats[-1]
                    found[f"{who}: call, {'in turn' if is_in_turn else 'at once'}"].append(stats.stall_seconds * 1e3)
                    if not is_in_turn:
                        found[f"{who}: durable, at once"].append((stats.durable_seconds or 0) * 1e3)
    files = [path for path in (roots["together"] / str(2 * task.saves)).rglob("*") if path.is_file()]
    data = [path for path in files if path.parent.name == "d" and is_data(path, task.count)]
    metadata = sum(path.stat().st_size for path in files) - sum(path.stat().st_size for path in data)
    about = {"messages": sent / task.saves / 2, "files": len(files), "metadata_bytes": metadata}
    return found | about


def save_once(task: Task, saver: Any, tree: Any, name: str, step: int, *, is_in_turn: bool) -> None:
    """Saves in all processes, and waits until it is durable in all."""
    for turn in range(task.count if is_in_turn else 1):
        meet(f"{name}-{turn}", task.count)
        if turn == task.process or not is_in_turn:
            saver.save(step, tree)
    saver.wait()
    meet(f"{name}-durable", task.count)


def is_data(path: Path, count: int) -> bool:
    """Returns whether a data file holds values: with several processes, those of the index do not."""
    return count == 1 or "ocdbt.process_" in str(path)


def measure_small(task: Task) -> dict[str, Any]:
    """Saves a small replicated state by turns: ours, and stock Orbax's asynchronous checkpointer."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from offstep import Checkpointer

    host = np.zeros((SMALL_ROWS, SMALL_ROWS), np.float32)
    tree = {f"leaf_{number}": spread(host, jax.devices(), sharded=False) for number in range(SMALL_LEAVES)}
    times: dict[str, list[float]] = {"ours": [], "stock": []}
    stock = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
    with Checkpointer(Path(task.directory, "small")) as ours:
        for step in range(task.saves + 1):
            meet(f"ours-{step}", task.count)
            started = time.perf_counter()
            ours.save(step, tree)
            ours.wait()
            times["ours"].append((time.perf_counter() - started) * 1e3)
            meet(f"stock-{step}", task.count)
            started = time.perf_counter()
            stock.save(Path(task.directory, "stock", str(step)), args=ocp.args.StandardSave(tree))
            stock.wait_until_finished()
            times["stock"].append((time.perf_counter() - started) * 1e3)
    stock.close()
    return {who: found[1:] for who, found in times.items()}  # the first ones compile and start


if __name__ == "__main__":
    main()
