"""What do the figures of a benchmark look like? (Needs matplotlib.)

    python benchmarks/plot.py benchmarks/results/<date>-<machine>-stall.json

Writes an image beside the JSON file: for `frequency` the overhead against N, for all others the effective stall and
`t_call` of every peer, one group of bars per workload, on a logarithmic scale.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from peers import BASELINE, OURS, PEERS

mpl.use("Agg")
import matplotlib.pyplot as plt

# Of offstep, and of its other formats.
OUR_COLOURS = ("#d1495b", "#e07a5f", "#f2a07b")
OTHER_COLOURS = (
    "#30638e",
    "#4f7942",
    "#a8c69f",
    "#c9a227",
    "#7d5ba6",
    "#c3b1e1",
    "#5c6b73",
    "#b0bec5",
    "#7f4f24",
    "#3d405b",
    "#8fb8d8",
)
FLOOR_MILLISECONDS = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    for path in parser.parse_args().results:
        data = json.loads(path.read_text())
        figure = plot_overhead(data) if path.stem.endswith("frequency") else plot_bars(data)
        figure.savefig(path.with_suffix(".svg"), bbox_inches="tight")
        print(path.with_suffix(".svg"))


def plot_bars(data: dict[str, Any]) -> plt.Figure:  # JSON
    """Returns two panels: effective stall with its spread, and `t_call` with its 99th percentile."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 4.5), sharey=True)
    for panel, title, key in zip(panels, ("effective stall per save", "t_call"), ("stall", "call"), strict=True):
        _draw_groups(panel, data["workloads"], key)
        panel.set_title(title)
        panel.set_yscale("log")
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("milliseconds")
    handles, labels = panels[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="lower center", ncols=3, bbox_to_anchor=(0.5, -0.2))
    figure.suptitle(_describe(data))
    return figure


def _draw_groups(panel: plt.Axes, workloads: list[dict[str, Any]], key: str) -> None:
    for group, workload in enumerate(workloads):
        rows = [row for row in workload["rows"] if PEERS[row["peer"]].finished != "never"]
        width = 0.8 / max(1, len(rows))
        for i, row in enumerate(rows):
            low, middle, high = (max(FLOOR_MILLISECONDS, 1e3 * seconds) for seconds in _read(row, key))
            errors = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
            at = group + (i - (len(rows) - 1) / 2) * width
            panel.bar(at, middle, width, yerr=errors, color=_colour(row["peer"]), label=row["label"])
    panel.set_xticks(range(len(workloads)), [workload["workload"]["name"] for workload in workloads])


def _read(row: dict[str, Any], key: str) -> tuple[float, float, float]:
    if key == "call":
        return row["call_seconds"]["low"], row["call_p50"], row["call_p99"]
    spread = row["stall_seconds"]
    return spread["low"], spread["median"], spread["high"]


def plot_overhead(data: dict[str, Any]) -> plt.Figure:  # JSON
    """Returns the overhead in percent against N, one line per peer."""
    figure, panel = plt.subplots(figsize=(8, 4.5))
    names = [name for name in data["workloads"][0]["runs"] if name != BASELINE]
    for name in names:
        points = [_overhead(workload, name) for workload in data["workloads"] if name in workload["runs"]]
        panel.plot(*zip(*points, strict=True), marker="o", color=_colour(name), label=PEERS[name].label)
    panel.set(xscale="log", yscale="symlog", xlabel="saved every N steps", ylabel="overhead, %", title=_describe(data))
    panel.grid(alpha=0.3)
    panel.legend()
    return figure


def _overhead(workload: dict[str, Any], name: str) -> tuple[int, float]:
    seconds, without = (
        statistics.median(run["wall_seconds"] for run in workload["runs"][peer]) for peer in (name, BASELINE)
    )
    return workload["workload"]["save_freq"], 100 * (seconds / without - 1)


def _colour(name: str) -> str:
    savers = [peer.name for peer in PEERS.values() if peer.finished != "never"]
    alike = [other for other in savers if other.startswith(OURS) == name.startswith(OURS)]
    colours = OUR_COLOURS if name.startswith(OURS) else OTHER_COLOURS
    return colours[alike.index(name) % len(colours)]


def _describe(data: dict[str, Any]) -> str:  # JSON
    machine = data["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['file_system']}, {data['date']}"


if __name__ == "__main__":
    main()
