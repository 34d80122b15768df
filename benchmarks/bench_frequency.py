"""How much longer does training take when it saves every N steps?

    python benchmarks/bench_frequency.py
    python benchmarks/bench_frequency.py --quick --every 5 10

Overhead is (wall time of the run until everything is finished / wall time without a callback) - 1.
"""

from __future__ import annotations

import statistics

from command import WIDTH, parse_command, report_workloads
from harness import Runs
from peers import BASELINE, PEERS
from rich.console import Console
from rich.table import Table
from workloads import WORKLOADS, at_frequency

EVERY = (1, 2, 5, 10, 20, 50, 100)


def main() -> None:
    command = parse_command(__doc__, workloads=["D"], every=EVERY)
    chosen = [at_frequency(WORKLOADS[name], every) for name in command.workloads for every in command.every]
    print_overheads(report_workloads("frequency", command, chosen))


def print_overheads(all_runs: list[Runs]) -> None:
    """Prints the overhead in percent: one row per peer, one column per frequency."""
    table = Table("overhead, %", *(runs.workload.name for runs in all_runs))
    for name in all_runs[0].by_peer:
        if name != BASELINE:
            table.add_row(PEERS[name].label, *(_overhead(runs, name) for runs in all_runs))
    Console(width=WIDTH, highlight=False).print(table)


def _overhead(runs: Runs, name: str) -> str:
    if name not in runs.by_peer:
        return "failed"
    seconds, without = (
        statistics.median(result["wall_seconds"] for result in runs.by_peer[peer]) for peer in (name, BASELINE)
    )
    return f"{100 * (seconds / without - 1):.1f}"


if __name__ == "__main__":
    main()
