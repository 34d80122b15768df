"""Is what was reported durable still there, and was anybody told of what is not?

    python benchmarks/scorecard/run.py                            # hours; kept in benchmarks/results/
    python benchmarks/scorecard/run.py --quick                    # does everything work?
    python benchmarks/scorecard/run.py --scenarios kill_trainer --peers offstep model_checkpoint --trials 20
    python benchmarks/scorecard/run.py --into RESULT --missing --minutes 8  # hours in pieces: repeat it

Each trial trains and saves in a process of its own, in a real `fit` where the peer is a callback. This process keeps
what was reported durable, does what goes wrong, and has a fresh process without offstep restore what is there and
compare every value. Prints `N of M survived | lost L bytes | silent S | unreported U | hung H` for each peer.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
sys.path.append(str(HERE.parents[1] / "tests"))  # for processes

from bench import Bench  # noqa: E402
from disks import sweep  # noqa: E402
from machine import describe_machine, free_path, today  # noqa: E402
from peers import ALL, PEERS, Peer  # noqa: E402
from scenario import Scenario, collect_scenarios  # noqa: E402
from verdict import Tally  # noqa: E402
from writer_entry import SABOTAGE  # noqa: E402

RESULTS = HERE.parent / "results"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
DEFAULT_DIRECTORY = HERE.parents[1] / "build" / "scorecard"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the scenarios; returns 1 if ours did not survive everything."""
    scenarios = collect_scenarios()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=list(scenarios), default=list(scenarios))
    parser.add_argument("--peers", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--quick", action="store_true", help="as few trials as show that everything works")
    parser.add_argument("--trials", type=int, help="of each scenario and peer, rather than its own number")
    parser.add_argument("--sabotage", nargs="+", choices=list(SABOTAGE), default=[], help="what our writers leave out")
    parser.add_argument("--wrapper", nargs="+", default=[], help="a command that runs our trainees, such as eatmydata")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIRECTORY, help="where checkpoints go (%(default)s)")
    parser.add_argument(
        "--results", type=Path, help="where results go (benchmarks/results; with --quick or sabotage, DIR)"
    )
    parser.add_argument("--into", type=Path, help="an earlier result, to which these scenarios and peers are added")
    parser.add_argument("--missing", action="store_true", help="of that, only the trials that it has not yet")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no trial begins")
    options = parser.parse_args(arguments)
    if options.missing and options.into is None:
        parser.error("--missing needs --into")
    options.dir.mkdir(parents=True, exist_ok=True)
    for number in _SIGNALS:
        signal.signal(number, _leave)
    sweep(options.dir)
    path, data = open_results(options)
    deadline = time.monotonic() + 60 * options.minutes
    with Bench(options.dir, sabotage=options.sabotage, wrapper=options.wrapper) as bench:
        for name in options.scenarios:
            rows = data["scenarios"].setdefault(name, {"peers": {}})
            rows["question"] = scenarios[name].question
            for peer, row in run_scenario(bench, scenarios[name], rows["peers"], deadline, options):
                rows["peers"][peer] = row
                keep(path, data)
    keep(path, data)
    print(f"everything: {path}")
    ours = [row for name in options.scenarios for peer, row in _rows(data, name) if PEERS[peer].is_ours]
    return 0 if all(row["is_clean"] for row in ours) else 1


def _leave(number: int, _: object) -> None:
    """Ends the run in order: what is mounted must be unmounted. A second signal must not disturb that."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # also in `umount`, which inherits that
    sys.exit(128 + number)


def keep(path: Path, data: dict[str, Any]) -> None:  # JSON
    """Writes what is known so far."""
    data["scenarios"] = {name: scenario for name, scenario in data["scenarios"].items() if scenario["peers"]}
    path.write_text(json.dumps(data, indent=1))
    path.with_suffix(".txt").write_text(render(data))


def open_results(options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:  # JSON
    """Returns where results go, and those that are there already."""
    if options.into is not None:
        return options.into, json.loads(options.into.read_text())
    machine = describe_machine(options.dir)
    is_real = not (options.quick or options.sabotage or options.wrapper)
    folder = options.results or (RESULTS if is_real else options.dir)
    how = {name: getattr(options, name) for name in ("seed", "quick", "sabotage", "wrapper")}
    path = free_path(folder, f"{machine['name']}-scorecard")
    return path, {"machine": machine, "date": today(), **how, "scenarios": {}}


def run_scenario(
    bench: Bench, scenario: Scenario, before: dict[str, Any], deadline: float, options: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:  # JSON
    """Runs one scenario with all its peers; prints and yields what comes of each."""
    print(f"{scenario.name}: {scenario.question}", flush=True)
    for name in (name for name in options.peers if name in scenario.peers):
        earlier = before.get(name) if options.missing else None
        if earlier is not None and _is_complete(earlier, scenario, count_trials(scenario, PEERS[name], options)):
            continue
        started = time.monotonic()
        if started > deadline:
            return
        tally, is_over = run_peer(bench, scenario, PEERS[name], options, earlier, deadline)
        if not is_over and not scenario.adds_up:
            return
        row = asdict(tally) | {"text": str(tally), "is_clean": tally.is_clean, "is_over": is_over}
        row["seconds"] = round(time.monotonic() - started, 1)
        print(_line(name, row), flush=True)
        yield name, row


def run_peer(
    bench: Bench,
    scenario: Scenario,
    peer: Peer,
    options: argparse.Namespace,
    earlier: dict[str, Any] | None,  # JSON
    deadline: float,
) -> tuple[Tally, bool]:
    """Runs the trials of one peer that are missing; returns also whether all that there are have been made."""
    obstacle = scenario.find_obstacle()
    if obstacle is not None:
        return Tally(skipped=obstacle), True
    tally = Tally()
    if earlier is not None and scenario.adds_up:
        tally = Tally(**{each.name: earlier[each.name] for each in fields(Tally)})
    bench.rest(f"{options.seed} {scenario.name} {peer.name}" + (f" {tally.trials}" if tally.trials else ""))
    count = count_trials(scenario, peer, options) - tally.trials
    return tally, tally.take(scenario.run(bench, peer, count), deadline)


def count_trials(scenario: Scenario, peer: Peer, options: argparse.Namespace) -> int:
    """Returns how many trials are asked for."""
    trials: int = scenario.trials if peer.is_ours else scenario.peer_trials
    return options.trials or (scenario.quick if options.quick else trials)


def _is_complete(row: dict[str, Any], scenario: Scenario, count: int) -> bool:  # JSON
    """Returns whether nothing is missing; numbered cases may come to an end before so many."""
    if row["skipped"] is not None:
        return False
    return bool(row["trials"] >= count or (row.get("is_over") and not scenario.adds_up))


def render(data: dict[str, Any]) -> str:  # JSON
    """Returns the results as text."""
    texts = []
    for name, scenario in data["scenarios"].items():
        lines = [f"{name}: {scenario['question']}", *(_line(peer, row) for peer, row in _rows(data, name))]
        texts.append("\n".join(lines) + "\n")
    return "\n".join(texts)


def _rows(data: dict[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    return list(data["scenarios"].get(name, {"peers": {}})["peers"].items())  # else the time was over before


def _line(peer: str, row: dict[str, Any]) -> str:
    return f"    {PEERS[peer].label:30} {row['text']}"


if __name__ == "__main__":
    sys.exit(main())
