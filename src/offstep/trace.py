"""The timeline of a run as a trace that Perfetto and Chrome show: every event at its microsecond.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (Trace Event Format).
"""

from __future__ import annotations

from typing import Any

from offstep.figures import measure_lag
from offstep.history import Run, Save

MARK = '{"otherData":{"made by":"offstep report"'
"""How the file begins."""

TraceEvent = dict[str, Any]  # JSON

_TRAINER, _WRITER = 1, 2
_STEPS, _SNAPSHOTS = 1, 2
_WRITES, _RETENTION = 1, 2
_NAMES = (
    (_TRAINER, None, "training process"),
    (_TRAINER, _STEPS, "batches"),
    (_TRAINER, _SNAPSHOTS, "saves (training thread)"),
    (_WRITER, None, "offstep writer"),
    (_WRITER, _WRITES, "write"),
    (_WRITER, _RETENTION, "retention"),
)


def make_trace(run: Run) -> dict[str, Any]:  # JSON
    """Returns the trace of a run: a JSON document whose times are microseconds from its beginning."""
    events = [_name(*names) for names in _NAMES]
    for part in run.batches:
        name = f"{part.count} batches" if part.count > 1 else "batch"
        about = {
            "last step": part.step,
            "mean ms": 1e3 * part.seconds / part.count,
            "median ms": 1e3 * part.median_seconds,
        }
        events.append(_stretch(run, name, _TRAINER, _STEPS, (part.began, part.ended), about))
    for number, save in enumerate(run.saves, start=1):
        events += _trace_save(run, save, number)
    for at, taken in measure_lag(run).rises:
        events += [_lag(run, at, at - taken)]
    events.append(_lag(run, run.last_at, measure_lag(run).until - measure_lag(run).rises[-1][1]))
    events += [_moment(run, f"epoch {epoch} ends", at, _TRAINER, _STEPS) for epoch, at in run.epochs]
    return {"otherData": {"made by": "offstep report", "run": run.name, "began": run.began}, "traceEvents": events}


def _trace_save(run: Run, save: Save, number: int) -> list[TraceEvent]:
    name = f"step {save.step}"
    if save.is_skipped or save.error is not None:
        word = "skipped" if save.is_skipped else f"failed: {save.error}"
        return [_moment(run, f"{name} {word}", save.began, _TRAINER, _SNAPSHOTS)]
    hook_ends = save.began + save.compute_seconds + save.stall_seconds
    costs = {
        "path": save.path,
        "stall ms": 1e3 * save.stall_seconds,
        "waited for a slot ms": 1e3 * save.wait_seconds,
        "waited for the training step ms": 1e3 * save.compute_seconds,
    }
    events = [_stretch(run, f"save {name}", _TRAINER, _SNAPSHOTS, (save.began, hook_ends), costs)]
    if save.durable_at is None:
        return events
    writes_from = max(hook_ends, save.durable_at - save.write_seconds)
    about = {
        "bytes": save.written_bytes,
        "durable after ms": 1e3 * (save.durable_seconds or 0.0),
        "cpu ms": 1e3 * save.cpu_seconds,
    }
    events.append(_stretch(run, f"write {name}", _WRITER, _WRITES, (writes_from, save.durable_at), about))
    if save.retired:
        until = save.durable_at + save.retire_seconds
        gone = {"removed": list(save.retired)}
        events.append(_stretch(run, f"after {name}", _WRITER, _RETENTION, (save.durable_at, until), gone))
    flow = {"cat": "save", "id": number, "name": name}
    return [
        *events,
        flow | {"ph": "s", "pid": _TRAINER, "tid": _SNAPSHOTS, "ts": _micros(run, save.began)},
        flow | {"ph": "f", "bp": "e", "pid": _WRITER, "tid": _WRITES, "ts": _micros(run, writes_from)},
    ]


def _name(process: int, thread: int | None, text: str) -> TraceEvent:
    kind = "process_name" if thread is None else "thread_name"
    return {"ph": "M", "name": kind, "pid": process, "tid": thread or 0, "args": {"name": text}}


def _stretch(
    run: Run,
    name: str,
    process: int,
    thread: int,
    times: tuple[float, float],
    about: dict[str, Any],  # JSON
) -> TraceEvent:
    began, ended = (_micros(run, at) for at in times)
    shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in about.items()}
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": thread,
        "ts": began,
        "dur": max(ended - began, 0),
        "args": shown,
    }


def _moment(run: Run, name: str, at: float, process: int, thread: int) -> TraceEvent:
    return {"ph": "i", "s": "t", "name": name, "pid": process, "tid": thread, "ts": _micros(run, at)}


def _lag(run: Run, at: float, seconds: float) -> TraceEvent:
    name = "lag of the newest durable checkpoint"
    return {"ph": "C", "name": name, "pid": _TRAINER, "ts": _micros(run, at), "args": {"s": round(seconds, 6)}}


def _micros(run: Run, at: float) -> int:
    return max(0, round((at - run.began) * 1e6))
