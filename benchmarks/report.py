"""What do the runs say: one row per peer, in a table and in JSON?

Every figure is a median with its spread (lowest and highest repeat); percentiles of `t_call` are over all saves of all
repeats. What is reported as extra (wall time, CPU, memory, the next step) is the peer's minus that of the same runs
without a callback.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import Options, Runs
from machine import free_path, today
from peers import BASELINE, OURS, PEERS
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Spread:
    """A median with the lowest and highest of what it is the median of; `None` if there is nothing."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        known = [value for value in values if value is not None]
        return cls(statistics.median(known), min(known), max(known)) if known else None


@dataclass(frozen=True)
class Row:
    """What one peer cost on one workload.

    Attributes:
        call_seconds: `t_call`: the peer's hooks on the training thread, per save; median and spread of the repeats.
        state_bytes: Bytes of the state that is saved.
        call_p50, call_p99, call_max: Over all saves.
        visible_seconds: `t_call` plus what the step after the save took longer than without saving.
        stall_seconds: Effective stall per save over the whole run, until everything is finished.
        stall_training_seconds: The same until the last step, without the final wait.
        finished_seconds: From the start of the call until the checkpoint had its final name.
        durable_seconds: Until it was also fsynced; `None` if it never is.
        cpu_seconds_per_gb: Extra CPU seconds per 1e9 bytes of state saved.
        memory_bytes: Extra peak memory.
        checkpoint_bytes: Size of one checkpoint.
        idle_hook_seconds: The peer's hooks per step that is not followed by a save.
        copy_ratio: `call_p50` over the time to copy the state in warm memory.
        write_ratio: `durable_seconds` over the time of a direct write with fsync of the same bytes.
    """

    peer: str
    label: str
    state_bytes: int
    call_seconds: Spread
    call_p50: float
    call_p99: float
    call_max: float
    visible_seconds: Spread | None
    stall_seconds: Spread
    stall_training_seconds: Spread
    finished_seconds: Spread | None
    durable_seconds: Spread | None
    cpu_seconds_per_gb: Spread
    memory_bytes: Spread
    checkpoint_bytes: int
    idle_hook_seconds: float
    copy_ratio: float
    write_ratio: float | None


def summarise(runs: Runs) -> list[Row]:
    """Returns a row for each peer that ran, the baseline left out."""
    baseline = runs.by_peer.get(BASELINE)
    if not baseline:
        raise SystemExit(f"the run without a callback failed: {runs.failures[BASELINE]}")
    return [_row(runs, name, baseline) for name in runs.by_peer if name != BASELINE]


def _row(runs: Runs, name: str, baseline: list[dict[str, Any]]) -> Row:
    results = runs.by_peer[name]
    saves = [save for result in results for save in result["saves"]]
    calls = [save["call_seconds"] for save in saves]
    count = runs.workload.saves
    gigabytes = count * results[0]["state_bytes"] / 1e9
    durable = Spread.of(_durable_seconds(name, save, results[0]["equalised"]) for save in saves)
    p50 = float(np.percentile(calls, 50))
    bounds = best_bounds(runs)
    return Row(
        peer=name,
        label=PEERS[name].label,
        state_bytes=results[0]["state_bytes"],
        call_seconds=_need(Spread.of(_median_call(result) for result in results)),
        call_p50=p50,
        call_p99=float(np.percentile(calls, 99)),
        call_max=max(calls),
        visible_seconds=_visible_seconds(results, baseline),
        stall_seconds=_extra(results, baseline, lambda r: r["wall_seconds"], count),
        stall_training_seconds=_extra(results, baseline, lambda r: r["steps_seconds"], count),
        finished_seconds=Spread.of(_finished_seconds(name, save) for save in saves),
        durable_seconds=durable,
        cpu_seconds_per_gb=_extra(results, baseline, lambda r: r["cpu_seconds"], gigabytes),
        memory_bytes=_extra(results, baseline, lambda r: r["peak_memory_bytes"], 1),
        checkpoint_bytes=results[-1]["checkpoint_bytes"],
        idle_hook_seconds=statistics.median(result["other_hook_seconds"] for result in results),
        copy_ratio=p50 / bounds["copy_seconds"],
        write_ratio=durable.median / bounds["write_seconds"] if durable else None,
    )


def _need(spread: Spread | None) -> Spread:
    if spread is None:
        raise ValueError("a run without measured saves")
    return spread


def _median_call(result: dict[str, Any]) -> float:
    return statistics.median(save["call_seconds"] for save in result["saves"])


def _visible_seconds(results: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> Spread | None:
    undisturbed = statistics.median(save["next_step_seconds"] for result in baseline for save in result["saves"])
    saves = (save for result in results for save in result["saves"])
    return Spread.of(save["call_seconds"] + save["next_step_seconds"] - undisturbed for save in saves)


def _extra(
    results: list[dict[str, Any]],
    baseline: list[dict[str, Any]],
    read: Callable[[dict[str, Any]], float],
    divisor: float,
) -> Spread:
    """Difference of medians, and the spread of the differences of runs of the same repeat."""
    median = statistics.median(map(read, results)) - statistics.median(map(read, baseline))
    pairs = [read(result) - read(without) for result, without in zip(results, baseline, strict=True)]
    return Spread(median / divisor, min(pairs) / divisor, max(pairs) / divisor)


def _finished_seconds(peer: str, save: dict[str, Any]) -> float | None:
    how = PEERS[peer].finished
    if how == "call":
        return save["call_seconds"]
    if how == "own" and "finished_at" in save["own"]:
        return save["own"]["finished_at"] - save["started_at"]
    return None if how == "never" else save["named_seconds"]


def _durable_seconds(peer: str, save: dict[str, Any], equalised: bool) -> float | None:
    if PEERS[peer].durable:
        return save["own"].get("durable_seconds")
    if PEERS[peer].finished == "call":  # It fsyncs in its own call, or not at all.
        return save["call_seconds"] if equalised else None
    return save["fsynced_seconds"]


def best_bounds(runs: Runs) -> dict[str, float]:
    """Returns the seconds of each bound: the median over the repeats, by the method that is fastest so."""
    return {
        kind: min(statistics.median(bound[kind][method] for bound in runs.bounds) for method in runs.bounds[0][kind])
        for kind in runs.bounds[0]
    }


def find_row(rows: Sequence[Row], peer: str) -> Row | None:
    """Returns the row of a peer, if it ran."""
    return next((row for row in rows if row.peer == peer), None)


def print_machine(console: Console, machine: dict[str, Any], options: Options) -> None:
    """Prints where and how it was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, {machine['kernel']}"
    )
    console.print(f"checkpoints on {machine['file_system']}; Python {machine['python']}, {versions}")
    modes = f"{options.repeats} repeats, alternating; peers {'made durable' if options.equalise else 'as they are'}"
    console.print(f"{modes}; {'state awaited before each save' if options.barrier else 'no wait before a save'}\n")


def _milliseconds(spread: Spread | None, *, spread_too: bool = True) -> str:
    if spread is None:
        return "-"
    text = f"{1e3 * spread.median:.1f}"
    return f"{text} ({1e3 * spread.low:.1f}..{1e3 * spread.high:.1f})" if spread_too else text


def _megabytes(spread: Spread) -> str:
    return f"{spread.median / 1e6:.0f} ({spread.low / 1e6:.0f}..{spread.high / 1e6:.0f})"


def _durable_text(row: Row, *, spread_too: bool) -> str:
    if row.durable_seconds:
        return _milliseconds(row.durable_seconds, spread_too=spread_too)
    return "-" if PEERS[row.peer].finished == "never" else "not durable"


BOUNDS = {
    "copy_seconds": "memory copy, warm",
    "cold_copy_seconds": "memory copy, caches emptied before",
    "write_seconds": "direct write with fsync",
}
COLUMNS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "p50": ("t_call p50\nms", lambda row: f"{1e3 * row.call_p50:.2f}"),
    "p99": ("p99\nms", lambda row: f"{1e3 * row.call_p99:.2f}"),
    "max": ("max\nms", lambda row: f"{1e3 * row.call_max:.2f}"),
    "visible": ("t_call + next\nstep's delay, ms", lambda row: _milliseconds(row.visible_seconds, spread_too=False)),
    "stall": ("effective stall per\nsave, ms (spread)", lambda row: _milliseconds(row.stall_seconds)),
    "training": (
        "without the\nfinal wait, ms",
        lambda row: _milliseconds(row.stall_training_seconds, spread_too=False),
    ),
    "finished": ("finished\nms", lambda row: _milliseconds(row.finished_seconds, spread_too=False)),
    "durable": ("durable\nms", lambda row: _durable_text(row, spread_too=False)),
    "cpu": ("CPU s\nper GB", lambda row: f"{row.cpu_seconds_per_gb.median:.2f}"),
    "memory": ("extra peak\nMB", lambda row: f"{row.memory_bytes.median / 1e6:.0f}"),
    "disk": ("on disk\nMB", lambda row: f"{row.checkpoint_bytes / 1e6:.1f}" if row.checkpoint_bytes else "-"),
    "copy": ("t_call /\ncopy", lambda row: f"{row.copy_ratio:.2f}"),
    "write": ("durable /\nwrite", lambda row: f"{row.write_ratio:.2f}" if row.write_ratio else "-"),
    "durable_spread": ("durable, ms (spread)", lambda row: _durable_text(row, spread_too=True)),
    "finished_spread": ("finished, ms (spread)", lambda row: _milliseconds(row.finished_seconds)),
    "memory_ratio": ("extra peak /\nstate", lambda row: f"{row.memory_bytes.median / row.state_bytes:.2f}"),
    "memory_spread": ("extra peak, MB (spread)", lambda row: _megabytes(row.memory_bytes)),
}
STALL_COLUMNS = tuple(COLUMNS)[:13]


def print_rows(console: Console, runs: Runs, rows: Sequence[Row], columns: Sequence[str] = STALL_COLUMNS) -> None:
    """Prints the table of one workload and what bounds it."""
    workload, bounds = runs.workload, best_bounds(runs)
    baseline = runs.by_peer[BASELINE]
    step = statistics.median(r["steps_seconds"] for r in baseline) / (workload.saves * workload.save_freq + 1)
    first = baseline[0]
    console.print(
        f"[bold]{workload.name}: {workload.question}[/bold] ({first['state_bytes'] / 1e6:.0f} MB, "
        f"{first['state_variables']:,} variables; step {1e3 * step:.1f} ms; "
        f"saved every {workload.save_freq} steps, {workload.saves} saves a run)"
    )
    console.print(_rows_table(rows, columns))
    for kind, name in BOUNDS.items():
        rate = first["state_bytes"] / bounds[kind] / 1e9
        console.print(f"bound: {name}: {1e3 * bounds[kind]:.2f} ms ({rate:.1f} GB/s)")
    print_ratios(console, rows)
    for peer, text in runs.failures.items():
        console.print(f"[red]{PEERS[peer].label} failed:[/red] {text.strip().splitlines()[-1]}", markup=True)
    console.print()


def _rows_table(rows: Sequence[Row], columns: Sequence[str]) -> Table:
    table = Table("", *(COLUMNS[name][0] for name in columns))
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    for row in rows:
        table.add_row(
            row.label, *(COLUMNS[name][1](row) for name in columns), style="bold" if row.peer == OURS else None
        )
    return table


def print_ratios(console: Console, rows: Sequence[Row]) -> None:
    """Prints how much better ours is than each other peer that saves."""
    ours = find_row(rows, OURS)
    if ours is None:
        return
    for row in rows:
        if row.peer != OURS and PEERS[row.peer].finished != "never":
            ratios = "   ".join(f"{name} {ratio:.3g}x" for name, ratio in compare(ours, row).items())
            console.print(f"{row.label} / offstep:   {ratios}")


def compare(ours: Row, other: Row) -> dict[str, float]:
    """Returns by what factor the other peer's figure is larger; a figure that ours does not have is left out.

    Time to durable is compared with the other peer's time until finished where that peer is not durable.
    """
    pairs: dict[str, tuple[float, float]] = {
        "t_call": (other.call_p50, ours.call_p50),
        "effective stall": (other.stall_seconds.median, ours.stall_seconds.median),
        "CPU": (other.cpu_seconds_per_gb.median, ours.cpu_seconds_per_gb.median),
        "memory": (other.memory_bytes.median, ours.memory_bytes.median),
    }
    done = other.durable_seconds or other.finished_seconds
    if done and ours.durable_seconds:
        pairs["durable"] = (done.median, ours.durable_seconds.median)
    # A difference that noise made zero or negative has no ratio.
    return {name: theirs / mine for name, (theirs, mine) in pairs.items() if mine > 0 and theirs > 0}


def write_json(name: str, directory: Path, machine: dict[str, Any], options: Options, all_runs: Sequence[Runs]) -> Path:
    """Writes every run, the rows and the machine to `<date>-<machine>-<name>.json` and returns the path.

    An earlier measurement is never replaced: the name is numbered then.
    """
    path = free_path(directory, f"{machine['name']}-{name}")
    data = {
        "date": today(),
        "machine": machine,
        "repeats": options.repeats,
        "equalised": options.equalise,
        "barrier": options.barrier,
        "workloads": [_workload_json(runs) for runs in all_runs],
    }
    path.write_text(json.dumps(data, indent=1))
    return path


def _workload_json(runs: Runs) -> dict[str, Any]:
    rows = summarise(runs)
    ours = find_row(rows, OURS)
    others = [row for row in rows if ours and row.peer != OURS and PEERS[row.peer].finished != "never"]
    return {
        "workload": asdict(runs.workload),
        "rows": [asdict(row) for row in rows],
        "bounds": best_bounds(runs),
        "ratios_to_ours": {row.peer: compare(ours, row) for row in others} if ours else {},
        "bound_runs": runs.bounds,
        "runs": runs.by_peer,
        "failures": runs.failures,
    }
