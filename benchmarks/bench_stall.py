"""What does a save cost the training, with offstep and with everything else?

    python benchmarks/bench_stall.py             # A, B and C, three repeats
    python benchmarks/bench_stall.py --quick     # does everything work?

Every peer saves in a real `model.fit`, in a process of its own, in rotated order. The figures:

- `t_call`: the peer's hooks on the training thread around one save, the computation of the state not included
  (`measure` explains how). It is the figure that is easily made to look good: a peer may return at once and slow the
  next steps.
- `t_call + next step's delay`: adds what the very next step took longer than in the runs without a callback. A
  snapshot that keeps views of live arrays is paid for there, since XLA must then copy what it could have overwritten.
- effective stall per save: (wall time of the run - wall time without a callback) / saves, from the end of the warm-up
  until everything is finished. Nothing can hide from it: this is the headline. Once more without the final wait.
- finished: from the start of the call until the checkpoint has its final name. durable: until it is fsynced, files
  and directories; Keras and Orbax do not do that, so their rows say "not durable" unless `--equalise` does it for
  them.
- CPU seconds per GB: of the process and its children, minus those of the runs without a callback. The kernel's own
  writeback of dirty pages is not in it, which favours peers that never fsync.
- extra peak: private memory of all processes plus shared memory once, minus that of the runs without a callback.
- the last two columns: `t_call` over a copy of the same bytes in warm memory, `durable` over a direct write with
  fsync of the same bytes, both measured between the runs. 1.0 is perfect.
"""

from __future__ import annotations

from command import parse_command, report_workloads
from workloads import WORKLOADS


def main() -> None:
    command = parse_command(__doc__)
    report_workloads("stall", command, [WORKLOADS[name] for name in command.workloads])


if __name__ == "__main__":
    main()
