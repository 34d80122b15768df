"""What does a save cost when the state is many small arrays: 10 to 10,000 of them?

    python benchmarks/bench_small_leaves.py
    python benchmarks/bench_small_leaves.py --quick --leaves 1000

Bytes grow with the number of arrays, but slowly against what each array costs in Python: that is what is compared.
"""

from __future__ import annotations

from dataclasses import replace

from command import parse_command, report_workloads
from workloads import small_leaves

LEAVES = (10, 100, 1_000, 10_000)


def main() -> None:
    command = parse_command(__doc__, leaves=LEAVES)
    # XLA takes more than a minute for the largest; no run measures that.
    command = replace(command, options=replace(command.options, cache_compilation=True))
    report_workloads("small-leaves", command, [small_leaves(leaves) for leaves in command.leaves])


if __name__ == "__main__":
    main()
