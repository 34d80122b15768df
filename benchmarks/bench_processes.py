"""What does a save by several training processes cost, beside one process and beside stock Orbax?

    python benchmarks/bench_processes.py
    python benchmarks/bench_processes.py --quick --processes 1 2

Starts that many JAX processes on this machine, each with two virtual devices. Each process holds the same number of
bytes (`--megabytes`), sharded over all. It prints the time of the call, the time to durable, messages through the
coordination service, files, and bytes of metadata; XLA programs that a save compiles; and for a small state the time to
durable of stock Orbax's asynchronous checkpointer, which takes turns with ours. Real hosts do not share two cores and
one disk as these processes do: so they save one after another for the time of the call, and at once for all else.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import DEFAULT_DIRECTORY

LEAVES = 20
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
    tasks = [Task(process, count, port, directory, megabytes, saves, count == 2) for process in range(count)]
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
    calls = [milliseconds for report in found for milliseconds in report["call_ms"]]
    durable = [milliseconds for report in found for milliseconds in report["durable_ms"]]
    primary = found[0]
    print(
        f"{count} processes: call p50 {statistics.median(calls):.2f} ms (max {max(calls):.1f}); durable p50 "
        f"{statistics.median(durable):.0f} ms; messages per save {sum(report['messages'] for report in found):.1f}, of "
        f"the primary {primary['messages']:.1f}; files {primary['files']}; metadata {primary['metadata_bytes']} bytes; "
        f"XLA programs compiled for saves {sum(report['compiled'] for report in found)}"
    )
    for who in ("ours", "stock"):
        if who in primary:
            times = [milliseconds for report in found for milliseconds in report[who]]
            print(f"    small state, {who}: durable p50 {statistics.median(times):.0f} ms (max {max(times):.0f})")


def measure(task: Task) -> dict[str, Any]:
    """Runs in one of the processes."""
    import jax

    if task.count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{task.port}", task.count, task.process)
        count_messages()
    compiled: Counter[str] = Counter()
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.update([name]))
    tree = make_tree(task)
    meet("made", task.count)
    before = compiled["/jax/core/compile/backend_compile_duration"]
    found = measure_saves(task, tree)
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


def make_tree(task: Task) -> dict[str, Any]:
    import numpy as np

    rows = 2 * task.count
    columns = round(task.megabytes * 1e6 / LEAVES / 2 / 4)
    host = np.zeros((rows, columns), np.float32)
    return {f"leaf_{number}": spread(host, sharded=True) for number in range(LEAVES)}


def spread(host: Any, *, sharded: bool) -> Any:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("all",))
    sharding = NamedSharding(mesh, PartitionSpec("all") if sharded else PartitionSpec())
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def measure_saves(task: Task, tree: dict[str, Any]) -> dict[str, Any]:
    from offstep import Checkpointer

    root = Path(task.directory, "ours")
    with Checkpointer(root, max_to_keep=2) as checkpointer:
        checkpointer.save(0, tree)
        checkpointer.wait()
        sent = sum(messages.values())
        for step in range(1, task.saves + 1):
            for turn in range(task.count):
                meet(f"turn-{step}-{turn}", task.count)
                if turn == task.process:
                    checkpointer.save(step, tree)
            checkpointer.wait()
        per_save = (sum(messages.values()) - sent) / task.saves
        calls = [stats.stall_seconds * 1e3 for stats in checkpointer.stats[1:]]
        for step in range(task.saves + 1, 2 * task.saves + 1):
            meet(f"all-{step}", task.count)
            checkpointer.save(step, tree)
            checkpointer.wait()
        durable = [(stats.durable_seconds or 0) * 1e3 for stats in checkpointer.stats[1 + task.saves :]]
    files = [path for path in (root / str(2 * task.saves)).rglob("*") if path.is_file()]
    large = sum(path.stat().st_size for path in files if "ocdbt.process_" in str(path) or path.parent.name == "d")
    index = sum(path.stat().st_size for path in (root / str(2 * task.saves) / "pytree").glob("d/*"))
    metadata = sum(path.stat().st_size for path in files) - (large - index if task.count > 1 else large)
    return {
        "call_ms": calls,
        "durable_ms": durable,
        "messages": per_save,
        "files": len(files),
        "metadata_bytes": metadata,
    }


def measure_small(task: Task) -> dict[str, Any]:
    """Saves a small replicated state by turns: ours, and stock Orbax's asynchronous checkpointer."""
    import numpy as np
    import orbax.checkpoint as ocp

    from offstep import Checkpointer

    host = np.zeros((SMALL_ROWS, SMALL_ROWS), np.float32)
    tree = {f"leaf_{number}": spread(host, sharded=False) for number in range(SMALL_LEAVES)}
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
