"""How long does it take until a checkpoint is back in the devices' memory?

    python benchmarks/bench_restore.py             # A and B, five repeats
    python benchmarks/bench_restore.py --quick     # does everything work?

The same trained state is saved once by each writer. Then every peer restores it in a process of its own, in rotated
order, with all imports done and the model built before the clock starts (but for `load_model`, whose work that is);
the clock stops when every array is computed. The values are compared with those that were saved. "cold": the files
were thrown out of the page cache first; "warm": they were read once. "again": the second restore of the same process,
without what happens once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import empty_directory
from machine import describe_machine
from rich.console import Console
from rich.table import Table
from workloads import WORKLOADS, build

HERE = Path(__file__).parent
DEFAULT_DIRECTORY = HERE.parent / "build" / "benchmarks"
OURS = "offstep.restore"
CACHES = ("warm", "cold")

Model = Any  # Keras carries no types


# --- the peers: (model, directory with all checkpoints) → model with the state ---------------------------------------


def restore_ours(model: Model, directory: Path) -> Model:
    import offstep

    offstep.restore(model, directory / "ours")
    return model


def restore_ours_from(name: str) -> Callable[[Model, Path], Model]:
    def restore(model: Model, directory: Path) -> Model:
        import offstep

        offstep.restore(model, directory / name)
        return model

    return restore


def load_model(name: str) -> Callable[[Model, Path], Model]:
    def restore(model: Model, directory: Path) -> Model:
        import keras

        return keras.saving.load_model(directory / name)

    return restore


def load_weights(name: str) -> Callable[[Model, Path], Model]:
    def restore(model: Model, directory: Path) -> Model:
        model.load_weights(directory / name)
        return model

    return restore


def load_orbax(name: str) -> Callable[[Model, Path], Model]:
    def restore(model: Model, directory: Path) -> Model:
        from orbax.checkpoint import v1

        [step] = [path for path in (directory / name).iterdir() if path.name.isdecimal()]
        model.set_state_tree(v1.load(step, model.get_state_tree(), checkpointable_name="pytree"))
        return model

    return restore


PEERS: dict[str, Callable[[Model, Path], Model]] = {
    OURS: restore_ours,
    "offstep.restore of stock Orbax's directory": restore_ours_from("stock"),
    "offstep.restore of .weights.h5": restore_ours_from("model.weights.h5"),
    "keras load_weights of .weights.h5": load_weights("model.weights.h5"),
    "keras load_weights of stock Orbax's directory": load_weights("stock"),
    "keras load_model of .keras": load_model("model.keras"),
    "keras load_model of stock Orbax's directory": load_model("stock"),
    "keras load_model of our directory": load_model("ours"),
    "orbax load of stock Orbax's directory": load_orbax("stock"),
    "orbax load of our directory": load_orbax("ours"),
}


# --- what runs in processes of their own -----------------------------------------------------------------------------


def make_model(workload: str) -> Model:
    """Builds the workload's model with the optimizer's state; no step is computed."""
    model, _ = build(WORKLOADS[workload], seed=1)
    model.optimizer.build(model.trainable_variables)
    return model


def write_checkpoints(workload: str, directory: Path) -> None:
    import keras

    import offstep

    model = make_model(workload)
    for number, variable in enumerate(model.optimizer.variables):
        if variable.dtype == "float32" and variable.shape:
            variable.assign(keras.random.normal(variable.shape, seed=number))
    model.optimizer.iterations.assign(7)
    callback = offstep.ModelCheckpoint(directory / "ours" / "{step}")
    stock = keras.callbacks.OrbaxCheckpoint(str(directory / "stock"))
    for writer in (callback, stock):
        writer.set_model(model)
        writer.on_train_begin()
        writer.on_epoch_begin(0)
        writer.on_epoch_end(0, {})
        writer.on_train_end()
    model.save(directory / "model.keras")
    model.save_weights(directory / "model.weights.h5")
    (directory / "sums.json").write_text(json.dumps(list_sums(model)))


def list_sums(model: Model) -> list[float]:
    import numpy as np

    groups = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables)
    return [float(np.asarray(v.value, np.float64).sum()) for group in groups for v in group]


def restore_once(workload: str, peer: str, directory: Path) -> dict[str, Any]:
    import jax
    import keras  # noqa: F401  # imports are not what is measured

    if "offstep" in peer:
        import offstep.keras_restore
        import offstep.restoration  # noqa: F401
    else:
        from orbax.checkpoint import v1  # noqa: F401
    model = make_model(workload)
    restore = PEERS[peer]
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        model = restore(model, directory)
        jax.block_until_ready([v.value for v in (*model.variables, *model.optimizer.variables)])
        seconds.append(time.perf_counter() - started)
    return {"first": seconds[0], "again": seconds[1], "equal": list_sums(model) == read_sums(directory)}


def read_sums(directory: Path) -> list[float]:
    sums: list[float] = json.loads((directory / "sums.json").read_text())
    return sums


# --- what starts them ------------------------------------------------------------------------------------------------


def run_apart(*arguments: str) -> str:
    environment = {**os.environ, "KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, str(HERE / "bench_restore.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-1500:]}")
    return done.stdout.splitlines()[-1] if done.stdout else ""


def prepare_cache(directory: Path, cache: str) -> None:
    """Throws the files out of the page cache, or reads them into it."""
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if cache == "cold":
                os.fsync(descriptor)  # dirty pages would stay
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while os.read(descriptor, 1 << 23):
                    pass
        finally:
            os.close(descriptor)


def measure(workload: str, peers: list[str], repeats: int, parent: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Returns the results of all repeats by cache and peer; a peer that fails has none and its error is printed."""
    results: dict[str, dict[str, list[dict[str, Any]]]] = {cache: {peer: [] for peer in peers} for cache in CACHES}
    with empty_directory(parent) as directory:
        run_apart("--write", workload, "--dir", str(directory))
        failed: set[str] = set()
        for repeat in range(repeats):
            shift = repeat * len(peers) // repeats
            for peer in [*peers[shift:], *peers[:shift]]:
                for cache in CACHES:
                    if peer in failed:
                        continue
                    prepare_cache(directory, cache)
                    try:
                        answer = json.loads(run_apart("--restore", workload, peer, "--dir", str(directory)))
                    except RuntimeError as error:
                        failed.add(peer)
                        print(error, file=sys.stderr)
                        continue
                    results[cache][peer].append(answer)
                    print(f"  {workload} {cache} {peer}: {answer['first']:.3f} s", file=sys.stderr, flush=True)
    return results


def print_results(console: Console, workload: str, results: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    size = WORKLOADS[workload].state_bytes
    table = Table(title=f"{workload}: {WORKLOADS[workload].question}, {size / 1e6:.0f} MB")
    for column in ("peer", *(f"{cache}, ms" for cache in CACHES), "again, ms", "x ours, warm", "x ours, cold", "equal"):
        table.add_column(column, justify="left" if column == "peer" else "right")
    ours = {cache: _median(results[cache].get(OURS, []), "first") for cache in CACHES}
    for peer in results["warm"]:
        runs = {cache: results[cache][peer] for cache in CACHES}
        if not all(runs.values()):
            table.add_row(peer, *["failed"] * 2)
            continue
        ratios = [f"{_median(runs[cache], 'first') / ours[cache]:.2f}" if ours[cache] else "" for cache in CACHES]
        is_equal = all(run["equal"] for cache in CACHES for run in runs[cache])
        table.add_row(
            peer,
            *(_spread(runs[cache], "first") for cache in CACHES),
            _spread(runs["warm"], "again"),
            *ratios,
            "yes" if is_equal else "NO",
        )
    console.print(table)


def _median(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs) if runs else 0.0


def _spread(runs: list[dict[str, Any]], key: str) -> str:
    taken = [1e3 * run[key] for run in runs]
    return f"{statistics.median(taken):.0f} ({min(taken):.0f} to {max(taken):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["A", "B"])
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one repeat: does everything work?")
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIRECTORY, help="where checkpoints go (%(default)s)")
    parser.add_argument("--json", type=Path, help="where all results go")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--restore", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_checkpoints(arguments.write, arguments.dir)
    elif arguments.restore:
        print(json.dumps(restore_once(*arguments.restore, arguments.dir)))
    else:
        run_all(arguments)


def run_all(arguments: argparse.Namespace) -> None:
    console = Console(width=160, highlight=False)
    machine = describe_machine(arguments.dir)
    console.print(json.dumps(machine))
    repeats = 1 if arguments.quick else arguments.repeats
    results = {}
    for workload in arguments.workloads:
        results[workload] = measure(workload, arguments.peers, repeats, arguments.dir)
        print_results(console, workload, results[workload])
        if arguments.json:
            arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
