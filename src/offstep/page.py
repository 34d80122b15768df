"""The report of a run as one HTML file that needs nothing else: no script, no network, no font."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from offstep import panels
from offstep.figures import (
    Cost,
    Inflation,
    Lag,
    Loss,
    measure_cost,
    measure_inflation,
    measure_lag,
    measure_loss,
    snapshots,
    spread,
)
from offstep.history import History, Run, Save
from offstep.panels import make_section
from offstep.words import DASH, MINUS, show_clock, show_count, show_seconds, show_share, spell_bytes

MARK = "<!doctype html><!-- offstep report -->"
"""How the file begins: by this it is known when it is made again."""

Cell = str | tuple[str, str]
"""Text, or a class and text."""

_STYLE = Path(__file__).with_name("page.css")
_SHOWN_SAVES = 50
_SHOWN_FAILURES = 20
_STALL = "what a save's hook took on the training thread, without its wait for the training step that was running."
_COST = "stalls, and what batches took longer while a save was on its way, of the time of all batches and stalls."
_AFTER = "from when its state was computed."
_DURABLE = "survives a kill and a power cut."


def render(history: History, run: Run, *, now: float) -> str:
    """Returns the report of one run of a log as HTML.

    Args:
        history: The log.
        run: Which run.
        now: Seconds since the epoch at which the report is made.
    """
    inflation, lag = measure_inflation(run), measure_lag(run)
    parts = [
        _make_header(history, run, now),
        _make_tiles(run, measure_cost(run, inflation), inflation),
        _make_loss(run, measure_loss(run), lag),
        panels.make_timeline(run),
        panels.make_phases(run),
        _pair(panels.make_stalls(run), panels.make_inflation(inflation)),
        panels.make_lag(run, lag),
        _make_failures(run),
        _make_saves(run),
        _make_runs(history, run),
        _make_footer(history, now),
    ]
    return (
        f'{MARK}<html lang="en"><head><meta charset="utf-8"><title>offstep: {escape(_name(run))}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE.read_text()}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _name(run: Run) -> str:
    return run.filepath or "a run"


def _make_header(history: History, run: Run, now: float) -> str:
    length = show_seconds(run.last_at - run.began)
    state = f"ran for {length} and came to its end"
    if not run.has_ended:
        age = show_seconds(max(0.0, now - run.last_at))
        state = f"still running, or killed, after {length}: the last line of its log is {age} old"
    lines = [
        f"Began {_show_moment(run.began)}, {state}.",
        ", ".join(f"{library} {version}" for library, version in run.versions.items()),
    ]
    if history.unreadable:
        lines.append(f"Left out: {show_count(history.unreadable, 'line')} of the log that cannot be read.")
    shown = "<br>".join(escape(line) for line in lines if line)
    return (
        f'<header><div class="brand">offstep report</div><h1 class="mono">{escape(_name(run))}</h1>'
        f'<p class="about">{shown}</p></header>'
    )


def _make_tiles(run: Run, cost: Cost, inflation: Inflation) -> str:
    stall = spread([save.stall_seconds for save in snapshots(run)])
    durable = spread([seconds for save in run.durable if (seconds := save.durable_after_seconds) is not None])
    written = sum(save.written_bytes for save in run.durable)
    seconds = sum(save.write_seconds for save in run.durable)
    tiles = [
        ("Stall of a save", show_seconds(stall.median), f"at most {show_seconds(stall.most)}"),
        ("All it has cost", show_share(cost.share), _describe_cost(cost)),
        ("Slower steps", *_describe_change(inflation)),
        ("Durable after", show_seconds(durable.median), f"at most {show_seconds(durable.most)}"),
        ("Durable", f"{len(run.durable):,}", _describe_outcomes(run)),
        ("Written", spell_bytes(written), f"{spell_bytes(round(written / seconds))}/s" if seconds else "nothing yet"),
    ]
    return f'<div class="tiles">{"".join(_make_tile(*tile) for tile in tiles)}</div>'


def _make_tile(name: str, value: str, more: str) -> str:
    words = f"<span>{escape(name)}</span><strong>{escape(value)}</strong><span>{escape(more)}</span>"
    return f'<div class="tile">{words}</div>'


def _describe_cost(cost: Cost) -> str:
    if cost.inflation_seconds is None:
        return f"{show_seconds(cost.stall_seconds)}: stalls only"
    return f"{show_seconds(cost.total_seconds)} in all"


def _describe_change(inflation: Inflation) -> tuple[str, str]:
    if inflation.ratio is None:
        return DASH, "cannot be known"
    change, chance = inflation.ratio - 1, show_share(inflation.error)
    if abs(change) <= inflation.error:
        return "none", f"or below {chance}"
    return f"{'+' if change > 0 else MINUS}{show_share(abs(change))}", f"\N{PLUS-MINUS SIGN} {chance}"


def _describe_outcomes(run: Run) -> str:
    counts = [
        (sum(save.error is not None for save in run.saves), "failed"),
        (sum(save.is_skipped for save in run.saves), "skipped"),
        (sum(save.is_pending for save in run.saves), "on the way"),
    ]
    words = [f"{count:,} {word}" for count, word in counts if count]
    return ", ".join(words) or f"of {show_count(len(run.saves), 'save')}"


def _make_loss(run: Run, loss: Loss, lag: Lag) -> str:
    kind, text = _describe_loss(run, loss)
    more = (
        f"At a random moment of this run {show_seconds(lag.mean)} of training would have been lost, "
        f"{show_seconds(lag.most)} at worst."
    )
    title = "What is safe" if run.has_ended else "If the job died now"
    words = f'<p>{escape(text)}</p><p class="more">{escape(more)}</p>'
    return f'<section class="callout {kind}"><h2>{title}</h2>{words}</section>'


def _describe_loss(run: Run, loss: Loss) -> tuple[str, str]:
    steps = show_count(loss.steps, "step")
    if loss.newest is None:
        return "bad", f"Nothing is durable: all of it would be lost, {show_seconds(loss.seconds)} or {steps}."
    newest = f"step {loss.newest.step:,}"
    if run.has_ended and loss.steps == 0:
        return "good", f"Nothing would be lost: {newest}, the last one, is durable."
    if run.has_ended:
        return "", f"The run ended {steps} after the newest durable checkpoint, {newest}. These were not saved."
    text = (
        f"A power cut would cost {show_seconds(loss.seconds)} of training, {steps}: {newest} is the newest durable one."
    )
    if loss.pending:
        kept = loss.pending[-1]
        lost = show_seconds(max(0.0, run.last_at - kept.began))
        text += f" If only the training process were killed, the writer would finish step {kept.step:,}: {lost} lost."
    return "", text


def _pair(left: str, right: str) -> str:
    return f'<div class="pair">{left}{right}</div>' if left or right else ""


def _make_failures(run: Run) -> str:
    failed = [save for save in run.saves if save.error is not None]
    if not failed:
        return ""
    rows: list[list[Cell]] = [
        [f"{save.step:,}", show_clock(save.began - run.began), ("words", save.error or "")]
        for save in failed[-_SHOWN_FAILURES:]
    ]
    text = f"{show_count(len(failed), 'save')} failed; what was durable before stayed."
    text += f" These are the newest {len(rows)}." if len(failed) > len(rows) else ""
    return make_section("Failures", text, _make_table(["step", "after", "error"], rows))


def _make_saves(run: Run) -> str:
    shown = run.saves[: -_SHOWN_SAVES - 1 : -1]
    if not shown:
        return make_section("Checkpoints", "No save was logged.", "")
    kept = sum(save.durable_seconds is not None and not save.is_retired for save in run.saves)
    verb = "is" if kept == 1 else "are"
    text = f"{show_count(len(run.saves), 'save')}, newest first; by the log, {kept:,} {verb} still there."
    text += f" These are the newest {len(shown)}." if len(shown) < len(run.saves) else ""
    columns = ["step", "state", "-after", "stall", "durable after", "-size", "-speed", "-checkpoint"]
    return make_section("Checkpoints", text, _make_table(columns, [_make_row(run, save) for save in shown]))


def _make_row(run: Run, save: Save) -> list[Cell]:
    return [
        f"{save.step:,}",
        _describe_state(save),
        show_clock(save.began - run.began),
        show_seconds(save.stall_seconds) if save.stall_seconds else DASH,
        DASH if save.durable_after_seconds is None else show_seconds(save.durable_after_seconds),
        spell_bytes(save.written_bytes) if save.written_bytes else DASH,
        spell_bytes(round(save.written_bytes / save.write_seconds)) + "/s" if save.write_seconds else DASH,
        ("mono", _shorten(save.path)),
    ]


def _shorten(path: str) -> str:
    parts = Path(path).parts
    return path if len(parts) < 4 else os.path.join("…", *parts[-2:])


def _describe_state(save: Save) -> Cell:
    if save.error is not None:
        return "state failed", "failed"
    if save.is_skipped:
        return "state skipped", "skipped"
    if save.durable_seconds is None:
        return "state pending", "on its way"
    return ("state", "retired") if save.is_retired else ("state kept", "durable")


def _make_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Returns a table; columns whose name begins with a dash are left out where there is little room."""
    wide = [column.startswith("-") for column in columns]
    names = [("", column.lstrip("-")) for column in columns]
    head = "".join(_make_cell("th", cell, is_wide) for cell, is_wide in zip(names, wide, strict=True))
    body = "".join(
        f"<tr>{''.join(_make_cell('td', cell, is_wide) for cell, is_wide in zip(row, wide, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _make_cell(tag: str, cell: Cell, is_wide: bool) -> str:
    kind, text = cell if isinstance(cell, tuple) else ("", cell)
    names = f"{kind} wide".strip() if is_wide else kind
    return f'<{tag} class="{names}">{escape(text)}</{tag}>' if names else f"<{tag}>{escape(text)}</{tag}>"


def _make_runs(history: History, shown: Run) -> str:
    if len(history.runs) < 2:
        return ""
    rows: list[list[Cell]] = [
        [
            ("mono", run.name) if run is not shown else ("mono state kept", run.name),
            _show_moment(run.began),
            show_seconds(run.last_at - run.began),
            f"{len(run.durable):,}",
            "yes" if run.has_ended else "no",
            ("mono", _shorten(run.filepath)),
        ]
        for run in history.runs[: -_SHOWN_SAVES - 1 : -1]
    ]
    text = f"{len(history.runs):,} runs are in this log, newest first; --run NAME shows another one."
    columns = ["run", "-began", "length", "durable", "ended", "-saves to"]
    return make_section("Runs", text, _make_table(columns, rows))


def _make_footer(history: History, now: float) -> str:
    terms = [("Stall", _STALL), ("All it has cost", _COST), ("Durable", _DURABLE), ("Durable after", _AFTER)]
    lines = [f"<b>{escape(term)}</b>: {escape(text)}" for term, text in terms]
    lines.append(
        f"Made {_show_moment(now)} from <code>{escape(str(history.path))}</code>. Every event at its microsecond: "
        "<code>offstep report LOG --trace trace.json</code>, then ui.perfetto.dev."
    )
    return f"<footer>{''.join(f'<p>{line}</p>' for line in lines)}</footer>"


def _show_moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
