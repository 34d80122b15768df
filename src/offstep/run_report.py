"""The command `offstep report`: from the event log of a run to a page to look at, and a trace for Perfetto."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from offstep import figures, page, publishing, trace
from offstep.commands import Answer
from offstep.figures import Spread
from offstep.history import History, Run, find_log, read_history
from offstep.words import show_count, show_seconds, show_share

DEFAULT_NAME = "offstep-report.html"


def report(args: Namespace) -> Answer:
    """Writes the report of a run.

    Raises:
        CheckpointNotFound: there is no log, or it is empty.
        UnsupportedFormat: it is no event log of ours.
        ValueError: there is no run of that name.
        OSError: the log cannot be read, or a result not written; a file that is no report is not replaced.
    """
    log = find_log(args.path)
    history = read_history(log)
    run = _choose(history, args.run_name)
    results: dict[Path, tuple[str, str]] = {  # what each begins with, and all of it
        args.out or log.with_name(DEFAULT_NAME): (page.MARK, page.render(history, run, now=time.time()))
    }
    if args.trace is not None:
        results[args.trace] = (trace.MARK, json.dumps(trace.make_trace(run), separators=(",", ":")))
    for target, (mark, _) in results.items():
        _refuse_other(target, mark, force=args.force)
    for target, (_, text) in results.items():
        _publish(target.absolute(), text)
    document = describe(history, run) | {"written": [str(target) for target in results]}
    return Answer(document, [*map(str, results), *_sentences(history, run)])


def describe(history: History, run: Run) -> dict[str, Any]:  # JSON
    """Returns what the report shows, as numbers."""
    inflation = figures.measure_inflation(run)
    cost, lag, loss = figures.measure_cost(run, inflation), figures.measure_lag(run), figures.measure_loss(run)
    durable = [seconds for save in run.durable if (seconds := save.durable_after_seconds) is not None]
    return {
        "log": str(history.path),
        "unreadable_lines": history.unreadable,
        "runs": [one.name for one in history.runs],
        "run": run.name,
        "filepath": run.filepath,
        "has_ended": run.has_ended,
        "seconds": run.last_at - run.began,
        "last_step": run.last_step,
        "saves": len(run.saves),
        "durable": len(durable),
        "failed": sum(save.error is not None for save in run.saves),
        "skipped": sum(save.is_skipped for save in run.saves),
        "pending_steps": [save.step for save in loss.pending],
        "stall_seconds": _describe_spread(figures.spread([save.stall_seconds for save in figures.snapshots(run)])),
        "durable_after_seconds": _describe_spread(figures.spread(durable)),
        "written_bytes": sum(save.written_bytes for save in run.durable),
        "step_time_ratio_while_writing": inflation.ratio,
        "step_time_ratio_error": None if inflation.ratio is None else inflation.error,
        "cost_seconds": cost.total_seconds,
        "is_cost_complete": cost.inflation_seconds is not None,
        "cost_share": cost.share,
        "lag_seconds": {"mean": lag.mean, "max": lag.most},
        "lost_now": {"seconds": loss.seconds, "steps": loss.steps},
        "newest_durable_step": None if loss.newest is None else loss.newest.step,
    }


def _describe_spread(found: Spread) -> dict[str, float] | None:
    return None if math.isnan(found.median) else asdict(found)


def _sentences(history: History, run: Run) -> list[str]:
    found = describe(history, run)
    stall, cost = found["stall_seconds"], found["cost_share"]
    lines = [f"{show_count(found['durable'], 'save')} durable, {found['failed']} failed, {found['skipped']} skipped"]
    if stall is not None:
        lines.append(
            f"stall {show_seconds(stall['median'])} in the median, {show_seconds(stall['most'])} at most; "
            f"all it has cost: {show_share(cost)} of the training"
            + ("" if found["is_cost_complete"] else ", stalls only")
        )
    if not run.has_ended:
        seconds, steps = show_seconds(found["lost_now"]["seconds"]), show_count(found["lost_now"]["steps"], "step")
        lines.append(f"if the job died now: {seconds} or {steps} of training lost")
    if history.unreadable:
        lines.append(f"left out: {show_count(history.unreadable, 'line')} of {history.path} that cannot be read")
    return lines


def _choose(history: History, name: str | None) -> Run:
    if name is None:
        return history.runs[-1]
    for run in history.runs:
        if run.name == name:
            return run
    names = ", ".join(run.name for run in history.runs[-10:])
    raise ValueError(f"the log has no run {name!r}; the newest in it are {names}")


def _refuse_other(target: Path, mark: str, *, force: bool) -> None:
    """Raises an error where nothing can be written, or something lies that is no earlier result of ours."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a directory is where the file shall go", str(target))
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such directory", str(target.parent))
    if force or not os.path.lexists(target):
        return
    if target.is_file():
        with target.open("rb") as file:
            if file.read(len(mark)) == mark.encode():
                return
    raise FileExistsError(errno.EEXIST, "it exists already; --force replaces it", str(target))


def _publish(target: Path, text: str) -> None:
    with publishing.open_scratch(target.parent) as file:
        file.write(text.encode())
        publishing.publish(file, target)
