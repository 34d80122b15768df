"""Templates and metric names that somebody chose to do harm: refused, or without effect."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import Bench, Trainee
from peers import ALL, Peer
from scenario import Scenario, judge_hanging
from verdict import Verdict


@dataclass(frozen=True)
class Case:
    """One attempt: a template (without suffix), or what the logs of an epoch hold."""

    template: str | None = None
    edit_logs: str | None = None


_HERE = "scenarios.hostile"
_CASES = (
    Case(edit_logs=f"{_HERE}:name_badly"),
    Case("{epoch.__class__.__mro__}"),
    Case(edit_logs=f"{_HERE}:give_bad_values"),
    Case("{tag}", f"{_HERE}:name_a_way_out"),
    Case("{epoch[0]}"),
    Case("{epoch!r}"),
    Case("{epoch:>200000000}"),
    Case("{0}"),
    Case("{epoch"),
    Case("{no_such_metric}"),
    Case("{epoch}\0"),
)


def name_badly(epoch: int, logs: dict[str, Any]) -> None:
    """In the trainee: metrics whose names are fields, paths, or nothing."""
    names = ("a/b", "../../escaped", "", "x" * 5_000, "\n{epoch}", "\udc80", "step", "batch", "__class__", "val_loss")
    logs |= dict.fromkeys(names, 1.0)


def give_bad_values(epoch: int, logs: dict[str, Any]) -> None:
    """In the trainee: metrics that are no numbers, or none that JSON has."""
    logs |= {"val_loss": float("inf"), "nan": float("nan"), "large": 10.0**300}


def name_a_way_out(epoch: int, logs: dict[str, Any]) -> None:
    """In the trainee: a text that leads out of the directory."""
    logs["tag"] = "../../escaped"


def _try_all(bench: Bench, peer: Peer, count: int) -> Generator[Verdict]:
    takes_templates = peer.in_fit and peer.name != "orbax_checkpoint"
    cases = [case for case in _CASES if takes_templates or case.template is None]
    for case in cases[:count]:
        yield judge_hanging(lambda: _try(bench, peer, case))  # noqa: B023


def _try(bench: Bench, peer: Peer, case: Case) -> Verdict:
    with bench.directory() as directory:
        inner = directory / "below" / "here"
        inner.mkdir(parents=True)
        spec: dict[str, Any] = {"epochs": 2, "batches": 5, "save_every": 0 if peer.in_fit else 5}
        if case.template is not None:
            spec["template"] = case.template + peer.suffix
        trainee = bench.start(peer, inner, edit_logs=case.edit_logs, **spec)
        trainee.hear_out()
        bench.settle()
        verdict = bench.judge(trainee) if case.template is None else _judge_template(trainee, case)
        return _look_around(directory, inner, verdict)


def _judge_template(trainee: Trainee, case: Case) -> Verdict:
    """Either it was an error, or it is just a name."""
    if trainee.claims.is_done:
        return Verdict()
    is_told = bool(trainee.errors.strip())
    return Verdict(is_unreported=not is_told, detail=f"{case.template}: {trainee.errors[-200:]}")


def _look_around(directory: Path, inner: Path, verdict: Verdict) -> Verdict:
    allowed = {inner, inner.parent}
    outside = [path for path in directory.rglob("*") if path not in allowed and inner not in path.parents]
    if outside:
        return replace(verdict, is_silent=True, detail=f"written outside: {outside[0].relative_to(directory)}")
    odd = [path.name for path in inner.rglob("*") if "class" in path.name]
    if odd:
        return replace(verdict, is_silent=True, detail=f"objects of Python in a name: {odd[0]}")
    return verdict


SCENARIOS = (
    Scenario(
        "hostile", "hostile templates and metric names", _try_all, len(_CASES), len(_CASES), 2, ALL, adds_up=False
    ),
)
