"""What does stock `EarlyStopping(restore_best_weights=True)` cost at each improvement, beside one copy into a slot?

    python benchmarks/bench_early_stopping.py
    python benchmarks/bench_early_stopping.py --workloads B --repeats 5

At an improvement Keras calls `model.get_weights()`: the weights alone, a third of the state under Adam. Beside it is
one snapshot into a warm slot of exactly these arrays, and of the whole state. They take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
from rich.console import Console
from rich.table import Table
from workloads import WORKLOADS, build, shrink

from offstep import keras_state
from offstep.arrays import describe_leaf
from offstep.buffers import Slot
from offstep.plans import make_plan
from offstep.snapshot import Snapshotter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["A", "B"])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    table = Table(
        "workload",
        "what",
        "MB",
        "median ms",
        "min",
        "max",
        title=f"keras {keras.__version__}, jax {jax.__version__}, {os.cpu_count()} cores, {options.repeats} repeats",
    )
    for name in options.workloads:
        for row in measure(name, options.repeats):
            table.add_row(name, *row)
    Console(width=120, highlight=False).print(table)


def measure(name: str, repeats: int) -> list[list[str]]:
    model, samples = build(shrink(WORKLOADS[name]), seed=1)
    model.fit(samples[: WORKLOADS[name].batch], samples[: WORKLOADS[name].batch], verbose=0)
    stopping = keras.callbacks.EarlyStopping("loss", restore_best_weights=True, mode="min")
    stopping.set_model(model)
    stopping.on_train_begin()
    losses = iter(range(repeats + 3, 0, -1))  # each is an improvement
    peers = {
        "EarlyStopping, an improvement": lambda: stopping.on_epoch_end(1, {"loss": float(next(losses))}),
        "copy into a slot, the weights": copying(model, weights_only=True),
        "copy into a slot, the state": copying(model, weights_only=False),
    }
    seconds: dict[str, list[float]] = {peer: [] for peer in peers}
    for turn in range(repeats + 2):
        for peer, run in peers.items():
            started = time.perf_counter()
            run()
            if turn >= 2:  # the first ones touch their memory
                seconds[peer].append(time.perf_counter() - started)
    sizes = [size_of(model, weights_only) for weights_only in (True, True, False)]
    return [describe(peer, size, seconds[peer]) for peer, size in zip(peers, sizes, strict=True)]


def copying(model: Any, *, weights_only: bool) -> Callable[[], None]:
    arrays = keras_state.live_arrays(model, weights_only=weights_only)
    paths = keras_state.describe_state(model, weights_only=weights_only).paths
    plan = make_plan([describe_leaf(path, array) for path, array in zip(paths, arrays, strict=True)])
    snapshotter, slot = Snapshotter(plan, arrays, mode="host", threads=2), Slot(plan.slot_bytes, shared=True)
    return lambda: snapshotter.take(keras_state.live_arrays(model, weights_only=weights_only), slot)


def size_of(model: Any, weights_only: bool) -> float:
    return sum(array.nbytes for array in keras_state.live_arrays(model, weights_only=weights_only)) / 1e6


def describe(peer: str, megabytes: float, seconds: Sequence[float]) -> list[str]:
    numbers = [statistics.median(seconds), min(seconds), max(seconds)]
    return [peer, f"{megabytes:,.1f}", *(f"{number * 1e3:.2f}" for number in numbers)]


if __name__ == "__main__":
    main()
