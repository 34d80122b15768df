"""When is a checkpoint durable, with offstep and with everything else?

    python benchmarks/bench_durable.py
    python benchmarks/bench_durable.py --quick --workloads B

The runs are those of `bench_stall`, with what Keras and Orbax leave out done for them: after a checkpoint of theirs has
its final name, every file and directory of it and the directory above are fsynced. `finished` is the time until the
final name, `durable` until the last fsync, both from the start of the call on the training thread.
"""

from __future__ import annotations

from dataclasses import replace

from command import parse_command, report_workloads
from workloads import WORKLOADS

COLUMNS = ("finished_spread", "durable_spread", "write", "cpu", "disk", "stall")


def main() -> None:
    command = parse_command(__doc__)
    command = replace(command, options=replace(command.options, equalise=True))
    report_workloads("durable", command, [WORKLOADS[name] for name in command.workloads], COLUMNS)


if __name__ == "__main__":
    main()
