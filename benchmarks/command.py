"""Which options do all benchmarks share, and how does one go from options to tables and JSON?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness import Options, Runs, run_alternating
from machine import describe_machine
from peers import DEFAULT_PEERS, PEERS, Peer, select_peers
from report import RESULTS, STALL_COLUMNS, print_machine, print_rows, summarise, write_json
from rich.console import Console
from workloads import WORKLOADS, Workload, shrink

DEFAULT_DIRECTORY = Path(__file__).resolve().parents[1] / "build" / "benchmarks"
WIDTH = 230


@dataclass(frozen=True)
class Command:
    """What was asked for.

    Attributes:
        options: How to run.
        peers: Who can run here.
        workloads: Names of workloads.
        quick: As few saves and repeats as show that everything works.
        save_freq: Batches from save to save, if not the workload's own.
        every: Frequencies, where a benchmark varies them.
        leaves: Numbers of arrays, where a benchmark varies them.
    """

    options: Options
    peers: list[Peer]
    workloads: list[str]
    quick: bool
    save_freq: int | None
    every: list[int]
    leaves: list[int]

    def adapt(self, workload: Workload) -> Workload:
        """Applies `--quick` and `--save-freq`."""
        workload = shrink(workload) if self.quick else workload
        return replace(workload, save_freq=self.save_freq) if self.save_freq else workload


def parse_command(
    doc: str | None,
    *,
    peers: Sequence[str] = DEFAULT_PEERS,
    workloads: Sequence[str] = ("A", "B", "C"),
    every: Sequence[int] = (),
    leaves: Sequence[int] = (),
) -> Command:
    """Parses the command line; the text of `--help` is the module's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=[*PEERS, "all"], default=list(peers))
    parser.add_argument("--repeats", type=int, help="runs of every peer (3; 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="few saves, one repeat: does everything work?")
    parser.add_argument("--equalise", action="store_true", help="fsync the checkpoints of peers that do not")
    parser.add_argument("--no-barrier", action="store_true", help="do not wait for the state before a save")
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIRECTORY, help="where checkpoints go (%(default)s)")
    parser.set_defaults(workloads=[], every=[], leaves=[], save_freq=None)
    if leaves:
        parser.add_argument("--leaves", nargs="+", type=int, default=list(leaves), help="numbers of arrays")
    else:
        parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(workloads))
    if every:
        parser.add_argument("--every", nargs="+", type=int, default=list(every), help="batches from save to save")
    else:
        parser.add_argument("--save-freq", type=int, help="batches from save to save (each workload has its own)")
    return _make_command(parser.parse_args())


def _make_command(arguments: argparse.Namespace) -> Command:
    if "tmpfs" in describe_machine(arguments.dir)["file_system"]:
        print(f"note: {arguments.dir} is in memory, so nothing here says anything about a disk")
    chosen, missing = select_peers(list(PEERS) if "all" in arguments.peers else arguments.peers)
    for name, module in missing.items():
        print(f"left out: {PEERS[name].label} (module {module} is missing)")
    options = Options(
        arguments.dir,
        repeats=arguments.repeats or (1 if arguments.quick else 3),
        equalise=arguments.equalise,
        barrier=not arguments.no_barrier,
    )
    return Command(
        options,
        chosen,
        arguments.workloads,
        arguments.quick,
        arguments.save_freq,
        arguments.every,
        arguments.leaves,
    )


def report_workloads(
    name: str, command: Command, workloads: Sequence[Workload], columns: Sequence[str] = STALL_COLUMNS
) -> list[Runs]:
    """Runs every peer on every workload, prints a table for each and writes all to JSON."""
    console = Console(width=WIDTH, highlight=False)
    command.options.directory.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(command.options.directory)
    print_machine(console, machine, command.options)
    all_runs = []
    for workload in map(command.adapt, workloads):
        runs = run_alternating(workload, command.peers, command.options)
        print_rows(console, runs, summarise(runs), columns)
        all_runs.append(runs)
    if command.save_freq:
        name = f"{name}-every-{command.save_freq}"
    # A trial run must not take the place of a measurement.
    results = command.options.directory if command.quick else RESULTS
    path = write_json(name, results, machine, command.options, all_runs)
    console.print(f"all runs: {path}")
    return all_runs
