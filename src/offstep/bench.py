"""The command `offstep bench`: what saving costs on this machine, with offstep and with the callbacks of Keras."""

from __future__ import annotations

import errno
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from offstep.commands import DONE, Answer
from offstep.doctor import find_file_system
from offstep.frequency import parse_budget
from offstep.overhead import Advice, Cost, advise_for_budget, advise_for_failures, find_cost
from offstep.quantities import parse_bytes, parse_seconds
from offstep.tables import make_table, spell_age
from offstep.trial import PEERS, Spec, Trial, run_trials
from offstep.words import spell_bytes

_FAILED = 6
_OURS = "offstep"


def bench(args: Namespace) -> Answer:
    """Trains a model of the size asked for with each callback, and says what its saves cost.

    Raises:
        ValueError: an argument is out of range.
        BudgetExceeded: memory or disk are too small for such a state.
        OSError: it cannot be saved in the directory, or no training ended well.
    """
    spec, budget = _read_spec(args), parse_budget(args.budget)
    mtbf_seconds = None if args.mtbf is None else parse_seconds(args.mtbf)
    trials, failures = run_trials(spec, lambda text: print(f"offstep: {text}", file=sys.stderr, flush=True))
    if not trials:
        raise ChildProcessError(f"no training ended well: {'; '.join(failures.values())}")
    return conclude(spec, trials, failures, budget=budget, mtbf_seconds=mtbf_seconds)


def conclude(
    spec: Spec, trials: Sequence[Trial], failures: Mapping[str, str], *, budget: float, mtbf_seconds: float | None
) -> Answer:
    """Returns what follows from trials, at least one, and from what others failed of."""
    costs = [find_cost(trial) for trial in trials]
    advice = {cost.peer: advise_for_budget(cost, budget) for cost in costs}
    optima = {} if mtbf_seconds is None else {cost.peer: advise_for_failures(cost, mtbf_seconds) for cost in costs}
    document = _describe_setting(spec, trials) | {
        "budget": budget,
        "mtbf_seconds": mtbf_seconds,
        "peers": [
            _describe_peer(trial, cost, advice[cost.peer], optima.get(cost.peer))
            for trial, cost in zip(trials, costs, strict=True)
        ],
        "failures": dict(failures),
    }
    shown: list[RenderableType] = [_head(spec, trials, costs), "", _make_cost_table(costs, spec.every), ""]
    shown += [_make_advice_table(costs, advice, optima, budget), ""]
    shown += _sentences(spec, trials, costs, advice, budget)
    shown += [f"{PEERS[peer]} failed: {text}" for peer, text in failures.items()]
    return Answer(document, shown, _FAILED if _OURS in failures else DONE)


def _read_spec(args: Namespace) -> Spec:
    for name in ("leaves", "saves", "every"):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            raise ValueError(f"--{name} must be at least 1. Received: {values}")
    if not args.path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "bench needs a directory that exists", os.fspath(args.path))
    return Spec(
        directory=str(args.path.absolute()),
        state_bytes=parse_bytes(args.state),
        leaves=args.leaves,
        step_seconds=parse_seconds(args.step),
        every=tuple(sorted(set(args.every))),
        saves=args.saves,
    )


def _describe_setting(spec: Spec, trials: Sequence[Trial]) -> dict[str, Any]:  # JSON
    return {
        "path": spec.directory,
        "file_system": _find_file_system(spec),
        "device": trials[0].device,
        "state_bytes": trials[0].state_bytes,
        "leaves": trials[0].leaves,
        "wanted_step_seconds": spec.step_seconds,
    }


def _describe_peer(trial: Trial, cost: Cost, advice: Advice, optimum: Advice | None) -> dict[str, Any]:  # JSON
    return asdict(cost) | {
        "label": PEERS[cost.peer],
        "is_durable": _is_durable(cost),
        "advice": asdict(advice),
        "optimum": None if optimum is None else asdict(optimum),
        "runs": [asdict(run) for run in trial.runs],
    }


def _head(spec: Spec, trials: Sequence[Trial], costs: Sequence[Cost]) -> str:
    trial, step = trials[0], _spell(costs[0].step_seconds)
    return (
        f"{spell_bytes(trial.state_bytes)} of state in {trial.leaves} leaves, steps of {step} on {trial.device}, "
        f"saved to {spec.directory} ({_find_file_system(spec)})"
    )


def _make_cost_table(costs: Sequence[Cost], every: Sequence[int]) -> RenderableType:
    columns = ["a save with", "call", "stall", "noise", "finished", "", *(f"every {count}" for count in every)]
    rows = [
        [
            PEERS[cost.peer],
            _spell(cost.call_seconds),
            _spell(cost.stall_seconds),
            f"± {_spell(cost.noise_seconds)}",
            _spell(cost.finished_seconds),
            "durable" if _is_durable(cost) else "not durable",
            *(f"{cost.overheads[count]:+.1%}" for count in every),
        ]
        for cost in costs
    ]
    return make_table(columns, rows, right=[name for name in columns[1:] if name])


def _make_advice_table(
    costs: Sequence[Cost], advice: Mapping[str, Advice], optima: Mapping[str, Advice], budget: float
) -> RenderableType:
    columns = [f"for at most {budget * 100:g} %", "save every", "that is", "a kill loses"]
    columns += ["best with failures", "wasted"] if optima else []
    rows = []
    for cost in costs:
        found = advice[cost.peer]
        period = _spell(found.every * cost.step_seconds)
        row = [PEERS[cost.peer], f"{found.every:,} batches", period, f"at most {_spell(found.lost_seconds)}"]
        if optima:
            best = optima[cost.peer]
            row += [f"{best.every:,} batches", f"{best.wasted:.2%}"]
        rows.append(row)
    return make_table(columns, rows, right=columns[1:])


def _sentences(
    spec: Spec, trials: Sequence[Trial], costs: Sequence[Cost], advice: Mapping[str, Advice], budget: float
) -> list[str]:
    shown = []
    if not trials[0].rounds:
        wanted = _spell(spec.step_seconds)
        shown.append(f"No work was added to the steps: Adam on such a state takes more than {wanted} here.")
    if any(cost.noise_seconds > cost.stall_seconds for cost in costs):
        shown.append("Some stalls are within the noise: measure while nothing else works on the machine.")
    if _OURS in advice:
        shown.append(
            f'Recommended: offstep.ModelCheckpoint("ckpts/{{step}}", save_freq={advice[_OURS].every}), or '
            f'overhead_budget="{budget * 100:g}%", which finds that out while it trains.'
        )
    return shown


def _find_file_system(spec: Spec) -> str:
    return find_file_system(Path(spec.directory), Path("/proc/self/mounts").read_text()) or "unknown file system"


def _is_durable(cost: Cost) -> bool:
    return cost.peer.startswith(_OURS)  # those of Keras never call fsync


def _spell(seconds: float) -> str:
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else spell_age(seconds)
