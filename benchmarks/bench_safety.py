"""What does it cost that a checkpoint survives a power cut, and that damage and NaN are noticed?

    python benchmarks/bench_safety.py --repeats 7
    python benchmarks/bench_safety.py --quick --workloads B

The runs are those of `bench_stall`, with the whole writer and with writers that leave something out: the fsyncs of
directories, the count of values that are not finite, the checksums in the manifest and the look at the files before
older ones go, and all of these. The last lines say what each takes in parts of the whole one: `durable 0.97x` says
that what was left out takes 3 % of the time to durable.
"""

from __future__ import annotations

from command import parse_command, report_workloads
from peers import LEAVING_OUT, OURS
from workloads import WORKLOADS

COLUMNS = ("p50", "p99", "visible", "stall", "durable_spread", "cpu")


def main() -> None:
    command = parse_command(__doc__, peers=(OURS, *LEAVING_OUT), workloads=("A",))
    report_workloads("safety", command, [WORKLOADS[name] for name in command.workloads], COLUMNS)


if __name__ == "__main__":
    main()
