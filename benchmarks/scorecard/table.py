"""Makes the table of `docs/durability.md` of one or more results.

python benchmarks/scorecard/table.py benchmarks/results/*-scorecard.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers import OURS, PEERS

Row = dict[str, Any]  # JSON
_COUNTS = ("trials", "survived", "lost_bytes", "silent", "unreported", "hung")
_STOCK = tuple(name for name in PEERS if name not in OURS)


def main(paths: Sequence[str]) -> None:
    """Prints the table; ours are added up over all formats."""
    scenarios: dict[str, Any] = {}
    for path in paths:
        for name, scenario in json.loads(Path(path).read_text())["scenarios"].items():
            before = scenarios.get(name, {"peers": {}})
            scenarios[name] = scenario | {"peers": before["peers"] | scenario["peers"]}
    labels = ["offstep", *(PEERS[name].label for name in _STOCK)]
    print("| what goes wrong |", " | ".join(labels), "|")
    print("|---" * (len(labels) + 1) + "|")
    for scenario in scenarios.values():
        rows = scenario["peers"]
        cells = [_cell([rows[name] for name in OURS if name in rows])]
        cells += [_cell([rows[name]] if name in rows else []) for name in _STOCK]
        print(f"| {scenario['question']} |", " | ".join(cells), "|")


def _cell(rows: list[Row]) -> str:
    if not rows:
        return "-"
    total = {name: sum(row[name] for row in rows) for name in _COUNTS}
    if not total["trials"]:
        return f"skipped ({rows[0]['skipped']})"
    faults = [f"{name} {total[name]}" for name in ("silent", "unreported", "hung") if total[name]]
    if total["lost_bytes"]:
        faults.insert(0, f"lost {total['lost_bytes'] / 1e6:.1f} MB")
    count = f"{total['survived']} of {total['trials']}"
    return f"**{count}**" if total["survived"] == total["trials"] else ", ".join([count, *faults])


if __name__ == "__main__":
    main(sys.argv[1:])
