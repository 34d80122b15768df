"""How much memory does saving take, beyond training?

    python benchmarks/bench_memory.py
    python benchmarks/bench_memory.py --quick --workloads C

Peak of private and shared memory of the process and its children while it trains and saves, minus that of the same run
without a callback, by proportional set size. Sampling it slows the runs a little, so no times are shown.
"""

from __future__ import annotations

from dataclasses import replace

from command import parse_command, report_workloads
from workloads import WORKLOADS

COLUMNS = ("memory_spread", "memory_ratio")


def main() -> None:
    command = parse_command(__doc__, workloads=["A", "C"])
    command = replace(command, options=replace(command.options, pss=True))
    report_workloads("memory", command, [WORKLOADS[name] for name in command.workloads], COLUMNS)


if __name__ == "__main__":
    main()
