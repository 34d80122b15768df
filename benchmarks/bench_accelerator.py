"""What does saving from a GPU or TPU cost: the bus, the stall, the slowdown, and the overhead at each frequency?

    PYTHONPATH=src python benchmarks/bench_accelerator.py --dirs /dev/shm/offstep build/benchmarks
    PYTHONPATH=src JAX_PLATFORMS=cpu python benchmarks/bench_accelerator.py --quick    # does everything work?

First the transfers, in a process of their own: bandwidth to the host of one large array into pinned memory (the bound),
through NumPy, and of a whole state by offstep's two ways, `device_copy` (what the training thread pays is the dispatch)
and `transfer`; and how much longer a step takes while the copy of a state is being fetched.

Then real `fit`s with each peer, to each directory (a RAM disk shows the bus, a disk the disk), for 4 GB and 16 GB of
state, saved every N steps: `t_call`, effective stall, time until durable, and the overhead in percent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_frequency import print_overheads
from command import DEFAULT_DIRECTORY, WIDTH, Command, report_workloads
from harness import Options
from peers import select_peers
from rich.console import Console
from workloads import Workload

if TYPE_CHECKING:
    import jax

PEERS = (
    "offstep",
    "orbax_checkpoint",
    "orbax_checkpoint_tuned",
    "orbax_async",
    "orbax_async_tuned",
)
EVERY = (1, 2, 5, 10, 50)
RUN_SECONDS = 3600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="megabytes, one frequency, one repeat")
    parser.add_argument("--gigabytes", nargs="+", type=float, default=[4, 16], help="sizes of the state")
    parser.add_argument("--every", nargs="+", type=int, default=list(EVERY), help="batches from save to save")
    parser.add_argument("--dirs", nargs="+", type=Path, default=[DEFAULT_DIRECTORY], help="where checkpoints go")
    parser.add_argument("--peers", nargs="+", default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--transfers", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.transfers:
        print(json.dumps(measure_transfers(arguments.transfers)))
        return
    sizes, every = ([0.05], [5]) if arguments.quick else (arguments.gigabytes, arguments.every)
    console = Console(width=WIDTH, highlight=False)
    for gigabytes in sizes:
        print_transfers(console, run_apart(gigabytes), gigabytes)
    for directory in arguments.dirs:
        command = make_command(directory, arguments.peers, 1 if arguments.quick else arguments.repeats, every)
        command = replace(command, quick=arguments.quick)
        chosen = [make_workload(gigabytes, count) for gigabytes in sizes for count in every]
        print_overheads(report_workloads(f"accelerator-{directory.resolve().parts[1]}", command, chosen))


def make_command(directory: Path, peers: list[str], repeats: int, every: list[int]) -> Command:
    """Returns what the other benchmarks read from their command lines."""
    chosen, missing = select_peers(peers)
    for name, module in missing.items():
        print(f"left out: {name} (module {module} is missing)")
    options = Options(directory, repeats=repeats, timeout_seconds=RUN_SECONDS)
    return Command(options, chosen, [], quick=False, save_freq=None, every=every, leaves=[])


def make_workload(gigabytes: float, every: int) -> Workload:
    """Returns a model whose layers have 201 MB of state each, or few small ones."""
    width = 4096 if gigabytes >= 1 else 512
    layers = max(1, round(gigabytes * 1e9 / (12 * width * (width + 1))))
    name = f"{gigabytes:g} GB, N={every}"
    return Workload(name, "on the accelerator", layers, width, batch=width, save_freq=every, saves=max(3, 20 // every))


# ------------------------------------------------------------------------------------------------- the transfers


def run_apart(gigabytes: float) -> dict[str, Any]:  # numbers and text, for JSON
    """Measures in a process that gives the device's memory back when it ends."""
    command = [sys.executable, __file__, "--transfers", str(gigabytes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=RUN_SECONDS)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def print_transfers(console: Console, result: dict[str, Any], gigabytes: float) -> None:
    console.print(f"[bold]transfers of {gigabytes:g} GB[/bold], {result.pop('device')}")
    for name, value in result.items():
        console.print(f"  {name:<60} {value}")
    console.print()


def measure_transfers(gigabytes: float, leaves: int = 80, repeats: int = 5) -> dict[str, Any]:  # for JSON
    """Returns bandwidths, times of the training thread, and the inflation of a step, as text by name."""
    import jax
    import jax.numpy as jnp

    from offstep.arrays import describe_leaf
    from offstep.buffers import Slot
    from offstep.plans import make_plan
    from offstep.snapshot import Snapshotter, has_room

    device = jax.devices()[0]
    size = int(gigabytes * 1e9 / 4 / leaves)
    arrays = [jnp.full(size, number, jnp.float32) for number in range(leaves)]
    plan = make_plan(describe_leaf((f"leaf{number}",), array) for number, array in enumerate(arrays))
    slot = Slot(plan.slot_bytes, shared=True)
    slot.prefault(2)
    results: dict[str, Any] = {"device": f"{device.device_kind}, JAX {jax.__version__}"}
    results |= measure_bounds(int(min(gigabytes, 1.0) * 1e9), repeats)
    transfer = Snapshotter(plan, arrays, mode="transfer")
    seconds = [_timed(lambda: transfer.take(arrays, slot)) for _ in range(repeats)]
    results["transfer: whole state, on the training thread"] = _rate(plan.state_bytes, seconds)
    copier = Snapshotter(plan, arrays, mode="device_copy")
    jax.block_until_ready(copier.copy_on_device(arrays))  # compiles
    calls, copies, fetches = [], [], []
    for _ in range(repeats):
        start = time.perf_counter()
        private = copier.copy_on_device(arrays)
        calls.append(time.perf_counter() - start)
        jax.block_until_ready(private)
        copies.append(time.perf_counter() - start)
        fetches.append(_timed(lambda private=private: copier.fetch(private, slot)))
    results["device_copy: dispatch, on the training thread"] = f"{1e3 * statistics.median(calls):.2f} ms"
    results["device_copy: until copied on the device"] = _rate(plan.state_bytes, copies)
    results["device_copy: fetched beside the training"] = _rate(plan.state_bytes, fetches)
    results |= measure_inflation(copier, arrays, slot)
    results["free memory would choose"] = "device_copy" if has_room(arrays) else "transfer"
    slot.close()
    return results


def measure_bounds(size_bytes: int, repeats: int) -> dict[str, str]:
    """Returns the bandwidth to the host of one large array, without anything of offstep's."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    make = jax.jit(lambda value: jnp.full(size_bytes // 4, value, jnp.float32))
    results = {}
    try:
        pinned = make(0).sharding.with_memory_kind("pinned_host")
        arrays = [jax.block_until_ready(make(number)) for number in range(repeats)]
        seconds = [_timed(lambda a=a: jax.block_until_ready(jax.device_put(a, pinned))) for a in arrays]
        results["bound: one array into pinned host memory"] = _rate(size_bytes, seconds)
    except (RuntimeError, ValueError) as error:
        results["bound: one array into pinned host memory"] = f"not here ({str(error).splitlines()[0][:60]})"
    fresh = [jax.block_until_ready(make(number)) for number in range(repeats)]
    results["NumPy: one array into fresh host memory"] = _rate(
        size_bytes, [_timed(lambda a=a: np.array(a)) for a in fresh]
    )
    return results


def measure_inflation(copier: Any, arrays: list[jax.Array], slot: Any, steps: int = 20) -> dict[str, str]:
    """Returns how long a step takes while the copy of a state is fetched by another thread, and without."""
    import jax
    import jax.numpy as jnp

    width, rounds = (256, 1) if jax.default_backend() == "cpu" else (4096, 50)
    x = jnp.ones((width, width), jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    step = jax.jit(lambda x: jax.lax.fori_loop(0, rounds, lambda _, y: y @ x / width, x))
    jax.block_until_ready(step(x))
    free = [_timed(lambda: jax.block_until_ready(step(x))) for _ in range(steps)]
    private = copier.copy_on_device(arrays)
    jax.block_until_ready(private)
    fetching = threading.Thread(target=copier.fetch, args=(private, slot))
    fetching.start()
    busy = []
    while fetching.is_alive():
        busy.append(_timed(lambda: jax.block_until_ready(step(x))))
    fetching.join()
    before, during = statistics.median(free), statistics.median(busy or free)
    text = f"{1e3 * before:.2f} ms free, {1e3 * during:.2f} ms during, {during / before - 1:+.1%} ({len(busy)} steps)"
    return {"a step while a copy is fetched": text}


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _rate(size_bytes: int, seconds: list[float]) -> str:
    median = statistics.median(seconds)
    spread = f"{1e3 * min(seconds):.1f}..{1e3 * max(seconds):.1f}"
    return f"{size_bytes / median / 1e9:.1f} GB/s, {1e3 * median:.1f} ms ({spread})"


if __name__ == "__main__":
    main()
