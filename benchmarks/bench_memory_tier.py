"""What does a snapshot in memory after every batch cost, and how much faster than from the disk is a restart from it?

    python benchmarks/bench_memory_tier.py             # workload A, five repeats
    python benchmarks/bench_memory_tier.py --quick     # does everything work?

A training with `memory_every=1` is killed again and again, and started again by the same command. Each restart reads
the step that was running: from the memory of the writer that the killed run has left, or, where that was sent away
before, from the directory in which the writer had saved it ("cold": thrown out of the page cache; "warm": read once).
The clock runs while the callback reads; the model is built and everything imported. `t_keep`: the hook that keeps a
snapshot, without the wait for the step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_restore import DEFAULT_DIRECTORY, prepare_cache
from harness import empty_directory
from machine import describe_machine
from workloads import WORKLOADS, build

SOURCES = ("memory", "cold", "warm")
BATCHES = 8  # of a run, until it is killed


def train(workload: str, directory: Path) -> None:
    """Goes on with the training, and dies after some batches."""
    import jax
    import keras

    import offstep
    from offstep import keras_saved_fit
    from offstep.engine import Engine

    keep, read, read_snapshot = Engine.keep, keras_saved_fit.read_saved_fit, keras_saved_fit.read_snapshot
    keeps: list[float] = []
    found: dict[str, Any] = {}

    def keep_timed(engine: Engine, arrays: Any, *arguments: Any, **options: Any) -> bool:
        jax.block_until_ready(arrays)
        started = time.perf_counter()
        is_kept = keep(engine, arrays, *arguments, **options)
        keeps.append(time.perf_counter() - started)
        return is_kept

    def timed(function: Any, source: str) -> Any:
        def read_timed(*arguments: Any) -> Any:
            jax.block_until_ready(jax.live_arrays())  # the model's first values may still be on their way
            started = time.perf_counter()
            result = function(*arguments)
            jax.block_until_ready(result.values)
            found.update(source=source, seconds=time.perf_counter() - started)
            return result

        return read_timed

    class Die(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if len(keeps) == BATCHES:
                print(json.dumps(found | {"keeps": keeps}), flush=True)
                os.kill(os.getpid(), 9)

    Engine.keep = keep_timed  # type: ignore[method-assign]
    keras_saved_fit.read_saved_fit, keras_saved_fit.read_snapshot = timed(read, "disk"), timed(read_snapshot, "memory")
    model, samples = build(WORKLOADS[workload], seed=1)
    callback = offstep.ModelCheckpoint(
        directory / "{step}", save_freq=1 << 40, memory_every=1, max_to_keep=1, resume=True
    )
    model.fit(
        samples, samples, batch_size=WORKLOADS[workload].batch, epochs=1000, verbose=0, callbacks=[callback, Die()]
    )


def run(workload: str, directory: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--train", workload, "--dir", str(directory)]
    environment = {**os.environ, "KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode != -9:
        raise RuntimeError(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(workload: str, repeats: int, parent: Path) -> dict[str, Any]:
    from offstep import memory_tier

    seconds: dict[str, list[float]] = {source: [] for source in SOURCES}
    keeps: list[float] = []
    with empty_directory(parent) as directory:
        run(workload, directory)
        for repeat in range(repeats):
            for source in (*SOURCES[repeat % 3 :], *SOURCES[: repeat % 3]):
                if source != "memory":
                    memory_tier.dismiss(directory)
                    prepare_cache(directory, source)
                result = run(workload, directory)
                if result["source"] != ("memory" if source == "memory" else "disk"):
                    raise RuntimeError(f"{source} was meant, {result['source']} was read")
                seconds[source].append(result["seconds"])
                keeps += result["keeps"]
                print(f"  {workload} {source}: {result['seconds']:.3f} s", file=sys.stderr, flush=True)
        memory_tier.dismiss(directory)
    return {"workload": workload, "restore_seconds": seconds, "keep_seconds": keeps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat of the small workload")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["A"])
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIRECTORY)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train, arguments.dir)
        return
    arguments.dir.mkdir(parents=True, exist_ok=True)
    workloads, repeats = (["B"], 1) if arguments.quick else (arguments.workloads, arguments.repeats)
    results = [measure(workload, repeats, arguments.dir) for workload in workloads]
    for result in results:
        keeps, memory = result["keep_seconds"], statistics.median(result["restore_seconds"]["memory"])
        print(
            f"{result['workload']}: t_keep p50 {statistics.median(keeps) * 1e3:.1f} ms, max {max(keeps) * 1e3:.1f} ms"
        )
        for source, times in result["restore_seconds"].items():
            median = statistics.median(times)
            spread = f"{min(times) * 1e3:.0f}..{max(times) * 1e3:.0f}"
            print(f"  restored, {source}: {median * 1e3:.0f} ms ({spread}), {median / memory:.1f} times memory")
    print(json.dumps({"machine": describe_machine(arguments.dir), "results": results}))


if __name__ == "__main__":
    main()
