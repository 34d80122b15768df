"""The charts of a report: the timeline of a run, the phases of its saves, stalls, slower batches, and the lag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from offstep import charts
from offstep.charts import Axis
from offstep.figures import Inflation, Lag, Spread, leave_out_compilation, snapshots, spread
from offstep.history import Run, Save
from offstep.words import show_count, show_seconds, show_share

_MOST_EPOCHS = 60
_SHOWN_PHASES = 8


@dataclass(frozen=True)
class _Phase:
    """A part of the way of a save. `words` explain the color."""

    color: str
    words: str


_PHASES = (
    _Phase("wait", "waits for a slot"),
    _Phase("stall", "snapshot"),
    _Phase("queue", "waits for the writer"),
    _Phase("write", "written and made durable"),
    _Phase("retire", "older ones removed"),
)


def make_timeline(run: Run) -> str:
    """Returns what happened when: steps, snapshots, writes, retention, and what went wrong."""
    axis = Axis(run.began, run.last_at)
    lanes = [_steps_lane(axis, run), _stall_lane(axis, run), _write_lane(axis, run)]
    lanes += [_retention_lane(axis, run), _trouble_lane(axis, run)]
    notes = " Pale: compilation." if run.batches else ""
    notes += " Dotted: an epoch ends." if _are_epochs_shown(run) else ""
    text = (
        f"The whole run, {show_seconds(axis.length)}, in {charts.COLUMNS} columns of "
        f"{show_seconds(axis.length / charts.COLUMNS)}.{notes}"
    )
    return make_section("Timeline", text, "".join(lanes) + charts.make_time_axis(axis))


def _are_epochs_shown(run: Run) -> bool:
    return 0 < len(run.epochs) <= _MOST_EPOCHS


def _epochs(axis: Axis, run: Run) -> str:
    return charts.draw_moments(axis, (at for _, at in run.epochs), "epoch") if _are_epochs_shown(run) else ""


def _steps_lane(axis: Axis, run: Run) -> str:
    usual = leave_out_compilation(run)
    known = {part.began for part in usual}
    means = charts.mean_of_columns(axis, ((part.began, part.ended, part.seconds / part.count) for part in usual))
    found = sorted(mean for mean in means if mean is not None)
    # One outlier must not flatten the rest.
    top = 1.15 * min(found[-1], 3 * found[int(0.98 * (len(found) - 1))]) if found else 0.0
    pale = charts.share_of_columns(axis, ((part.began, part.ended) for part in run.batches if part.began not in known))
    shapes = charts.draw_bars(pale, 1e-9, "pale") + charts.draw_bars(means, top, "step") + _epochs(axis, run)
    about, scale = ("mean of a batch", show_seconds(top)) if found else ("none is known yet", "")
    return charts.make_lane("Steps", about, shapes, top=scale, color="step", tall=True)


def _stall_lane(axis: Axis, run: Run) -> str:
    stalls = [(save.began, save.stall_seconds) for save in snapshots(run)]
    top = max((stall for _, stall in stalls), default=0.0)
    shapes = charts.draw_bars(charts.most_in_columns(axis, stalls), top, "stall") if top else ""
    about = "longest stall" if stalls else "none was taken"
    return charts.make_lane(
        "Snapshots", about, shapes + _epochs(axis, run), top=show_seconds(top) if top else "", color="stall", tall=True
    )


def _write_lane(axis: Axis, run: Run) -> str:
    stretches = [(at - save.write_seconds, at) for save in run.durable if (at := save.durable_at) is not None]
    shapes = charts.draw_bars(charts.share_of_columns(axis, stretches), 1.0, "write")
    return charts.make_lane("Writing", "share of the time", shapes + _epochs(axis, run), top="100 %", color="write")


def _retention_lane(axis: Axis, run: Run) -> str:
    removed = [(at, float(len(save.retired))) for save in run.durable if (at := save.durable_at) is not None]
    columns = charts.sum_in_columns(axis, removed)
    top = max(columns)
    shapes = charts.draw_bars(columns, top, "retire") if top else ""
    total = sum(len(save.retired) for save in run.durable)
    about = f"{total:,} removed" if total else "nothing removed"
    return charts.make_lane(
        "Retention",
        about,
        shapes + _epochs(axis, run),
        top=f"{top:,.0f} at once" if top > 1 else "",
        color="retire",
    )


def _trouble_lane(axis: Axis, run: Run) -> str:
    failed = [save.began for save in run.saves if save.error is not None]
    skipped = [save.began for save in run.saves if save.is_skipped]
    if not failed and not skipped:
        return ""
    parts = [f"{len(failed):,} failed"] * bool(failed) + [f"{len(skipped):,} skipped"] * bool(skipped)
    shapes = charts.draw_moments(axis, skipped, "skip") + charts.draw_moments(axis, failed, "fail")
    return charts.make_lane(
        "Not saved", ", ".join(parts), shapes + _epochs(axis, run), color="fail" if failed else "skip"
    )


def make_phases(run: Run) -> str:
    """Returns what the newest durable saves spent their time on."""
    newest = run.durable[-_SHOWN_PHASES:]
    if not newest:
        return ""
    most = max(sum(lengths) for lengths in map(_phase_lengths, newest))
    rows = "".join(
        charts.make_bar(
            f"step {save.step:,}",
            [(phase.color, length) for phase, length in zip(_PHASES, _phase_lengths(save), strict=True)],
            most,
            f"durable after {show_seconds(save.durable_after_seconds or 0.0)}",
        )
        for save in newest
    )
    used = [any(_phase_lengths(save)[index] > 0 for save in newest) for index in range(len(_PHASES))]
    legend = charts.make_legend(
        [(phase.color, phase.words) for phase, is_used in zip(_PHASES, used, strict=True) if is_used]
    )
    text = (
        f"The newest {show_count(len(newest), 'save')}, from when its state was computed. Training waits for the "
        "orange part (and for a slot, if none is free); the rest happens beside it."
    )
    return make_section("From snapshot to durable", text, rows + legend)


def _phase_lengths(save: Save) -> list[float]:
    durable = save.durable_after_seconds or 0.0
    write = min(save.write_seconds, durable)
    return [
        save.wait_seconds,
        max(0.0, save.stall_seconds - save.wait_seconds),
        max(0.0, durable - save.stall_seconds - write),
        write,
        save.retire_seconds if save.retired else 0.0,
    ]


def make_stalls(run: Run) -> str:
    """Returns the histogram of stalls."""
    stalls = [save.stall_seconds for save in snapshots(run)]
    if not stalls:
        return ""
    found = spread(stalls)
    return make_section(
        "Stall", _describe_stalls(found, len(stalls)), charts.make_histogram(stalls, [found.median], "stall")
    )


def _describe_stalls(found: Spread, count: int) -> str:
    rare = f"{show_seconds(found.p99)} at the 99th percentile, " if count >= 100 else ""
    return (
        f"How long training stood still for a save: <b>{show_seconds(found.median)}</b> in the median (dashed), "
        f"{rare}{show_seconds(found.most)} at most, of {show_count(count, 'save')}."
    )


def make_inflation(found: Inflation) -> str:
    """Returns what batches take beside a write, and without one."""
    if not found.free_count and not found.writing_count:
        return ""
    if found.is_ahead:
        return make_section("Steps beside a write", _describe_inflation(found), "")
    known = [(found.free_seconds, found.free_count), (found.writing_seconds, found.writing_count)]
    most = max(seconds for seconds, count in known if count) * 1.02
    rows = ""
    for name, color, (seconds, count) in zip(
        ("no save on its way", "while one is written"), ("step", "write"), known, strict=True
    ):
        parts = [(color, seconds)] if count else []
        text = f"{show_seconds(seconds)}, mean of {show_count(count, 'batch', 'batches')}" if count else "no batch"
        rows += charts.make_bar(name, parts, most, text)
    return make_section("Steps beside a write", _describe_inflation(found), rows)


def _describe_inflation(found: Inflation) -> str:
    if found.is_ahead:
        return (
            "The host dispatches batches far ahead of its device: in the median a save waits "
            f"{show_seconds(found.ahead_seconds)} until they are computed. So their times do not tell what a write "
            "costs them; <code>offstep bench</code> does."
        )
    if found.ratio is None:
        return "Too few batches of one kind to compare; the first two are left out, they hold compilation."
    change, chance = found.ratio - 1, show_share(found.error)
    if abs(change) <= found.error:
        return f"No difference that could not be chance: less than {chance}. Compilation is left out."
    words = f"{show_share(abs(change))} {'longer' if change > 0 else 'shorter'}"
    return f"A batch takes <b>{words}</b> than one without a save on its way, give or take {chance}."


def make_lag(run: Run, lag: Lag) -> str:
    """Returns how far the newest durable checkpoint was behind."""
    axis = Axis(run.began, lag.until)
    points = _thin([corner for rise in _corners(lag) for corner in rise], axis)
    shapes = charts.draw_area(axis, points, 1.08 * max(lag.most, 1e-9), "lag")
    lane = charts.make_lane(
        "Lag", "of the newest durable checkpoint", shapes, top=show_seconds(1.08 * lag.most), tall=True
    )
    text = (
        f"How much training would have been lost at each moment: <b>{show_seconds(lag.mean)}</b> on average, "
        f"{show_seconds(lag.most)} at worst."
    )
    return make_section(
        "Lag of the newest durable checkpoint", text, f'<div class="alone">{lane}{charts.make_time_axis(axis)}</div>'
    )


def _corners(lag: Lag) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    ends = [*(at for at, _ in lag.rises[1:]), lag.until]
    return [((at, at - taken), (end, end - taken)) for end, (at, taken) in zip(ends, lag.rises, strict=True)]


def _thin(points: Sequence[tuple[float, float]], axis: Axis) -> list[tuple[float, float]]:
    """Leaves the greatest and the least of each column where there are many points."""
    if len(points) <= 4 * charts.COLUMNS:
        return list(points)
    columns: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        columns.setdefault(axis.column(point[0]), []).append(point)
    kept = []
    for found in columns.values():
        ends = {min(found, key=lambda point: point[1]), max(found, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def make_section(title: str, text: str, content: str) -> str:
    """Returns a section; `text` is HTML."""
    return f"<section><h2>{escape(title)}</h2><p>{text}</p>{content}</section>"
