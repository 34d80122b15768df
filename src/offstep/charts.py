"""Charts as HTML with inline SVG: shapes stretch with the page, words keep their size. No script, no file beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from offstep.words import TIME_UNITS, show_digits, show_seconds

COLUMNS = 480
"""How many columns a chart has, however many events it shows."""

_MOST_TICKS = 6
_MOST_BINS = 29
_STEPS_OF_TIME = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200, 86_400)


# ------------------------------------------------------------------------------------------------- downsampling


@dataclass(frozen=True)
class Axis:
    """A stretch of time, in seconds since the epoch, laid over the columns."""

    began: float
    ended: float

    @property
    def length(self) -> float:
        """Seconds, more than none."""
        return max(self.ended - self.began, 1e-3)

    def place(self, at: float) -> float:
        """Returns where a moment is, in columns."""
        return min(max((at - self.began) / self.length, 0.0), 1.0) * COLUMNS

    def column(self, at: float) -> int:
        """Returns the column that a moment falls into."""
        return min(int(self.place(at)), COLUMNS - 1)


def most_in_columns(axis: Axis, points: Iterable[tuple[float, float]]) -> list[float]:
    """Returns the greatest value of each column, from (moment, value)."""
    columns = [0.0] * COLUMNS
    for at, value in points:
        index = axis.column(at)
        columns[index] = max(columns[index], value)
    return columns


def sum_in_columns(axis: Axis, points: Iterable[tuple[float, float]]) -> list[float]:
    """Returns the sum of the values of each column, from (moment, value)."""
    columns = [0.0] * COLUMNS
    for at, value in points:
        columns[axis.column(at)] += value
    return columns


def share_of_columns(axis: Axis, stretches: Iterable[tuple[float, float]]) -> list[float]:
    """Returns which part of each column is covered, from (began, ended) of stretches that do not overlap."""
    columns = [0.0] * COLUMNS
    for began, ended in stretches:
        first, last = axis.place(began), axis.place(ended)
        for index in range(int(first), min(int(last) + 1, COLUMNS)):
            columns[index] += min(last, index + 1) - max(first, index)
    return [min(share, 1.0) for share in columns]


def mean_of_columns(axis: Axis, stretches: Iterable[tuple[float, float, float]]) -> list[float | None]:
    """Returns the mean of what stretches (began, ended, value) have in each column; `None` where there is none."""
    weights, totals = [0.0] * COLUMNS, [0.0] * COLUMNS
    for began, ended, value in stretches:
        first, last = axis.place(began), axis.place(ended)
        for index in range(int(first), min(int(last) + 1, COLUMNS)):
            weight = max(min(last, index + 1) - max(first, index), 1e-6)
            weights[index] += weight
            totals[index] += weight * value
    return [total / weight if weight else None for total, weight in zip(totals, weights, strict=True)]


# ------------------------------------------------------------------------------------------------------- shapes


def draw_bars(heights: Sequence[float | None], top: float, color: str) -> str:
    """Returns a path of bars, one for each column, that stand on the ground; `top` reaches the upper edge."""
    parts = []
    index = 0
    while index < len(heights):  # neighbours of one height are one bar
        height, first = heights[index], index
        while index < len(heights) and heights[index] == height:
            index += 1
        if height:
            high = max(min(height / top, 1.0) * 100, 1.5)  # what is there can be seen
            parts.append(f"M{first} 100v-{_short(high)}h{index - first}V100z")
    return f'<path class="{color}" d="{"".join(parts)}"/>' if parts else ""


def draw_area(axis: Axis, points: Sequence[tuple[float, float]], top: float, color: str) -> str:
    """Returns the area below a line through (moment, value)."""
    if not points:
        return ""
    corners = [f"{_short(axis.place(at))} {_short(100 - 100 * min(value / top, 1.0))}" for at, value in points]
    first, last = axis.place(points[0][0]), axis.place(points[-1][0])
    return f'<path class="{color}" d="M{_short(first)} 100L{"L".join(corners)}L{_short(last)} 100z"/>'


def draw_moments(axis: Axis, moments: Iterable[float], color: str) -> str:
    """Returns an upright line for each moment, as thin on any screen."""
    found = sorted({round(axis.place(at), 1) for at in moments})
    return f'<path class="{color}" d="{"".join(f"M{_short(at)} 0v100" for at in found)}"/>' if found else ""


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


# ------------------------------------------------------------------------------------------------------- charts


def make_lane(name: str, about: str, shapes: str, *, top: str = "", color: str = "", tall: bool = False) -> str:
    """Returns one lane of a timeline: its name and what it shows at the left, its shapes at the right.

    Args:
        name: Plain text, as `about` and `top` are.
        about: What the height stands for.
        shapes: SVG in columns from the left, and percent from above.
        top: What the upper edge stands for.
        color: Class of the key beside the name.
        tall: Whether it needs room.
    """
    key = f'<i class="key {color}"></i>' if color else ""
    view = f'viewBox="0 0 {COLUMNS} 100" preserveAspectRatio="none" role="img" aria-label="{escape(name)}"'
    return (
        f'<div class="lane{" tall" * tall}">'
        f'<div class="name">{key}{escape(name)}<small>{escape(about)}</small></div>'
        f'<div class="scale">{escape(top)}</div>'
        f'<div class="plot"><svg {view}>{shapes}</svg></div></div>'
    )


def make_time_axis(axis: Axis) -> str:
    """Returns the row of times below lanes, counted from the beginning."""
    wanted = axis.length / _MOST_TICKS
    step = next((step for step in _STEPS_OF_TIME if step >= wanted), math.ceil(wanted / 86_400) * 86_400)
    if wanted < 1:
        step = next(base * 10**power for power in range(-9, 1) for base in (1, 2, 5) if base * 10**power >= wanted)
    size, unit = next((size, unit) for size, unit in reversed(TIME_UNITS) if step >= size * 0.9995)
    count = int(axis.length / step + 1e-9)
    ticks = [
        (number * step / axis.length, f"{show_digits(number * step / size) or '0'}") for number in range(count + 1)
    ]
    return make_ticks([(place, f"{text} {unit}") for place, text in ticks])


def make_ticks(ticks: Sequence[tuple[float, str]]) -> str:
    """Returns a row of labels at places from 0 to 1; every second one goes where there is little room."""
    spans = []
    for index, (place, text) in enumerate(ticks):
        kinds = (["minor"] if index % 2 else []) + (["first"] if place < 0.02 else ["last"] if place > 0.98 else [])
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        spans.append(f'<span{kind} style="left:{100 * place:.2f}%">{escape(text)}</span>')
    return f'<div class="lane axis"><div class="name"></div><div class="ticks">{"".join(spans)}</div></div>'


def make_histogram(values: Sequence[float], marks: Sequence[float], color: str) -> str:
    """Returns a histogram of lengths of time, on a logarithmic scale.

    Args:
        values: Seconds, at least one; what is not above 0 counts as a microsecond.
        marks: Values to point at.
        color: Class of the bars.
    """
    logs = [math.log10(max(value, 1e-6)) for value in values]
    low, high = _frame(min(logs), max(logs))
    bins = min(_MOST_BINS, max(9, 2 * round(len(values) ** 0.5) + 1))
    counts = [0] * bins
    for value in logs:
        counts[min(int((value - low) / (high - low) * bins), bins - 1)] += 1
    most = max(counts)
    width = COLUMNS / bins
    shapes = "".join(
        f'<rect class="{color}" x="{_short(index * width + 1)}" y="{_short(100 - max(100 * count / most, 1.5))}" '
        f'width="{_short(width - 2)}" height="{_short(max(100 * count / most, 1.5))}">'
        f"<title>{_describe_bin(low, high, bins, index)}: {count:,}</title></rect>"
        for index, count in enumerate(counts)
        if count
    )
    shapes += "".join(
        f'<path class="mark" d="M{_short((math.log10(max(value, 1e-6)) - low) / (high - low) * COLUMNS)} 0v100"/>'
        for value in marks
    )
    lane = make_lane("Saves", "by their stall", shapes, top=f"{most:,}", tall=True)
    return f'<div class="alone">{lane}{make_ticks(_log_ticks(low, high))}</div>'


def _frame(low: float, high: float) -> tuple[float, float]:
    """Widens a range of logarithms so that ticks fit: at least a factor of five."""
    room = max(0.7 - (high - low), 0.06) / 2
    return low - room, high + room


def _describe_bin(low: float, high: float, bins: int, index: int) -> str:
    edges = [show_seconds(10 ** (low + (high - low) * number / bins)) for number in (index, index + 1)]
    return escape(f"{edges[0]} to {edges[1]}")


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    bases = (1, 2, 5) if high - low < 2 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [(math.log10(base) + power, base * 10.0**power) for power in powers for base in bases]
    return [((at - low) / (high - low), show_seconds(value)) for at, value in ticks if low <= at <= high]


def make_bar(name: str, parts: Sequence[tuple[str, float]], most: float, text: str) -> str:
    """Returns a row with a bar of parts, (class, length), where `most` reaches the end, and words after it."""
    spans = "".join(
        f'<i class="{color}" style="width:{100 * length / most:.3f}%"></i>' for color, length in parts if length > 0
    )
    return (
        f'<div class="bar"><span class="name">{escape(name)}</span><span class="track">{spans}</span>'
        f'<span class="value">{escape(text)}</span></div>'
    )


def make_legend(entries: Sequence[tuple[str, str]]) -> str:
    """Returns the meaning of colors, from (class, words)."""
    keys = "".join(f'<span><i class="key {color}"></i>{escape(text)}</span>' for color, text in entries)
    return f'<p class="legend">{keys}</p>'
