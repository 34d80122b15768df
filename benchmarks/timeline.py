"""What does a training look like that saves, second by second? The picture of the README, drawn from results.

One lane for each callback, from left to right the same training steps: a block is a step, the part of it beyond the
usual length of a step in another colour, and so is the time between two steps in which the training thread waits. Of
the steps around a save the results know when they began and ended; those between two saves are drawn equally long.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from peers import BASELINE

WIDTH, LEFT, RIGHT = 960, 12, 12
TOP, LANE, BAR = 58, 62, 24
STYLE = """
text { font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
.page { fill: #ffffff; }
.small { font-size: 12px; fill: #59636e; }
.name { font-weight: 600; }
.step { fill: #5b8db8; }
.longer { fill: #e3a72f; }
.waits { fill: #d1495b; }
.line { stroke: #8b949e; stroke-width: 1; }
.usual { stroke: #59636e; stroke-width: 1.5; stroke-dasharray: 4 3; }
@media (prefers-color-scheme: dark) {
  .page { fill: #0d1117; } text { fill: #e6edf3; } .small { fill: #9198a1; }
  .step { fill: #4c7fa8; } .usual { stroke: #9198a1; }
}
"""
LEGEND = (
    ("step", "training step"),
    ("longer", "step made longer by a save"),
    ("waits", "training thread waits, at the end for all saves"),
)
LEAST_PIXELS = 0.4

Workload = dict[str, Any]  # of a file of results


@dataclass(frozen=True)
class Lane:
    """One run, in seconds from its first step on.

    Attributes:
        label: Who saves.
        costs: What its saves cost, in words.
        steps: Begin and end of each step.
        end_seconds: When all steps were done and all saves finished.
        usual_seconds: From step to step without a callback.
    """

    label: str
    costs: str
    steps: Sequence[tuple[float, float]]
    end_seconds: float
    usual_seconds: float


def read_lanes(workload: Workload, peers: Sequence[str]) -> list[Lane]:
    """Returns a lane for each of these peers that was run, from its run of median length."""
    rows = {row["peer"]: row for row in workload["rows"]}
    usual = statistics.median(run["steps_seconds"] for run in workload["runs"][BASELINE]) / _count_steps(workload)
    return [_read_lane(workload, rows[peer], usual) for peer in peers if peer in rows]


def _read_lane(workload: Workload, row: dict[str, Any], usual: float) -> Lane:
    runs = sorted(workload["runs"][row["peer"]], key=lambda run: run["wall_seconds"])
    run = runs[(len(runs) - 1) // 2]
    stall, finished = row["stall_seconds"]["median"], (row["durable_seconds"] or row["finished_seconds"])["median"]
    outcome = "durable" if row["durable_seconds"] else "finished, not durable,"
    costs = f"a save costs the training {_spell(stall)}, {outcome} after {_spell(finished)}"
    steps = list(_list_steps(workload, run))
    return Lane(row["label"], costs, steps, run["wall_seconds"], usual)


def _count_steps(workload: Workload) -> int:
    """Returns how many steps were timed: those that saves follow, those between, and one after the last save."""
    count: int = workload["workload"]["save_freq"] * workload["workload"]["saves"] + 1
    return count


def _list_steps(workload: Workload, run: dict[str, Any]) -> Iterator[tuple[float, float]]:
    count, begin = workload["workload"]["save_freq"], 0.0
    for save in run["saves"]:
        at = save["started_at"] - run["opened_at"]
        yield from itertools.pairwise(begin + (at - begin) * number / count for number in range(count + 1))
        after = at + save["gap_seconds"]
        begin = after + save["next_step_seconds"]
        yield after, begin
        count = workload["workload"]["save_freq"] - 1


def draw(title: str, lanes: Sequence[Lane]) -> str:
    """Returns the picture as SVG."""
    end = max(lane.end_seconds for lane in lanes)
    scale = (WIDTH - LEFT - RIGHT) / end
    height = TOP + LANE * len(lanes) + 36
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="6"/>',
        f'<text x="{LEFT}" y="22">{escape(title)}</text>',
        *_legend(),
        *_axis(end, scale, height),
    ]
    for number, lane in enumerate(lanes):
        parts += _lane(lane, TOP + LANE * number, scale)
    return "\n".join([*parts, "</svg>", ""])


def _legend() -> Iterator[str]:
    at = LEFT
    for name, text in LEGEND:
        yield f'<rect class="{name}" x="{at}" y="32" width="14" height="12" rx="2"/>'
        yield f'<text class="small" x="{at + 20}" y="43">{text}</text>'
        at += 40 + 6.2 * len(text)
    yield f'<line class="usual" x1="{at}" x2="{at + 16}" y1="38" y2="38"/>'
    yield f'<text class="small" x="{at + 22}" y="43">the same steps without saving</text>'


def _axis(end: float, scale: float, height: float) -> Iterator[str]:
    bottom = height - 36
    yield f'<line class="line" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    for second in range(int(end) + 1):
        at = LEFT + scale * second
        yield f'<line class="line" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 5}"/>'
        anchor = "start" if second == 0 else "middle"
        unit = " s" if second == int(end) else ""
        yield f'<text class="small" x="{at:.1f}" y="{bottom + 20}" text-anchor="{anchor}">{second}{unit}</text>'


def _lane(lane: Lane, top: float, scale: float) -> Iterator[str]:
    yield f'<text x="{LEFT}" y="{top + 16}"><tspan class="name">{escape(lane.label)}</tspan>'
    yield f'<tspan class="small" dx="10">{escape(lane.costs)}</tspan></text>'
    bar = top + 24
    cuts = [0.0, *(second for step in lane.steps for second in step), lane.end_seconds]
    for number, (begin, end) in enumerate(itertools.pairwise(cuts)):
        if number % 2 == 0:
            yield from _block("waits", begin, end, bar, scale)
        else:
            usual = min(end, begin + lane.usual_seconds)
            yield from _block("step", begin, usual, bar, scale)
            yield from _block("longer", usual, end, bar, scale)
    without = LEFT + scale * lane.usual_seconds * len(lane.steps)
    yield f'<line class="usual" x1="{without:.1f}" x2="{without:.1f}" y1="{bar - 4}" y2="{bar + BAR + 4}"/>'


def _block(name: str, begin: float, end: float, top: float, scale: float) -> Iterator[str]:
    width = scale * (end - begin)
    if width < LEAST_PIXELS:
        return
    inset = 0.5 if name == "step" and width > 3 else 0.0  # steps can be told from each other
    x, width = LEFT + scale * begin + inset, width - inset
    yield f'<rect class="{name}" x="{x:.2f}" y="{top}" width="{width:.2f}" height="{BAR}"/>'


def _spell(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
