"""Which figures does the README show? Puts those of the newest results between its two marks, and draws its picture.

python benchmarks/figures.py            # after new results: `SOURCES` says which files they come from
python benchmarks/figures.py --check    # only say whether README and picture are those of the results
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timeline import draw, read_lanes

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
PICTURE = HERE.parent / "docs/images/timeline.svg"
BEGIN, END = "<!-- figures: python benchmarks/figures.py -->\n", "<!-- end of figures -->\n"
SOURCES = ("2026-11-21-vm-stall-3.json", "2026-11-21-vm-stall.json", "2026-11-21-vm-stall-keras-files.json")

_HEAD = """\
| state | saved by | training thread kept for | run lengthened by, per save (effective stall) | finished after |
|---|---|---|---|---|
"""
_WORKLOADS = ("A", "B")
_PEERS = {
    "offstep": "**offstep**",
    "orbax_checkpoint": "keras `OrbaxCheckpoint`",
    "offstep_keras": "**offstep**, `.keras`",
    "model_checkpoint": "keras `ModelCheckpoint`, `.keras`",
}

Row = dict[str, Any]  # of a file of results


def main() -> None:
    made = {README: insert(README.read_text(), render()), PICTURE: draw_picture()}
    if "--check" in sys.argv[1:]:
        old = [str(path) for path, text in made.items() if path.read_text() != text]
        sys.exit(f"not of the newest results: {' '.join(old)}" if old else 0)
    for path, text in made.items():
        path.write_text(text)
        print(path)


def insert(text: str, table: str) -> str:
    """Returns the text with the table between the marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"{README} has no {BEGIN.strip()} ... {END.strip()}")
    return f"{before}{BEGIN}{table}{END}{after}"


def render() -> str:
    """Returns the table, and a line that says where and how it was measured."""
    documents = _read()
    return _HEAD + "".join(_rows(documents)) + f"\n{_describe(documents)}\n"


def draw_picture() -> str:
    """Returns the timeline of the first workload, as SVG."""
    found = _find_rows(_read(), _WORKLOADS[0])
    lanes = [lane for peer, (workload, _) in found.items() for lane in read_lanes(workload, [peer])]
    about = next(iter(found.values()))[0]["workload"]
    title = f"{len(lanes[0].steps)} training steps, {about['question']}, saved every {about['save_freq']} steps"
    return draw(title, lanes)


def _read() -> list[dict[str, Any]]:  # JSON
    documents = [json.loads((HERE / "results" / name).read_text()) for name in SOURCES]
    # `run_all.py` puts what `bench_stall.py` writes into a larger document.
    return [document.get("benchmarks", {}).get("stall", document) for document in documents]


def _find_rows(documents: list[dict[str, Any]], name: str) -> dict[str, tuple[dict[str, Any], Row]]:
    """Returns for each peer the workload of that name and its row; the first document that has both counts."""
    found = {}
    for peer in _PEERS:
        for workload in (one for document in documents for one in document["workloads"]):
            rows = [row for row in workload["rows"] if row["peer"] == peer]
            if workload["workload"]["name"] == name and rows:
                found.setdefault(peer, (workload, rows[0]))
    return found


def _rows(documents: list[dict[str, Any]]) -> Iterator[str]:
    for name in _WORKLOADS:
        found = _find_rows(documents, name)
        for number, (peer, (workload, row)) in enumerate(found.items()):
            question = "" if number else workload["workload"]["question"]
            yield f"| {question} | {_PEERS[peer]} | {_figures(row)} |\n"


def _figures(row: Row) -> str:
    mark = "**" if row["peer"].startswith("offstep") else ""
    stall, finished = row["stall_seconds"], row["durable_seconds"] or row["finished_seconds"]
    outcome = "durable" if row["durable_seconds"] else "not durable"
    spread = f"({stall['low'] * 1e3:,.0f} .. {stall['high'] * 1e3:,.0f})"
    figures = [mark + _spell(seconds) + mark for seconds in (row["call_p50"], stall["median"], finished["median"])]
    return "{} | {} {} | {}, {}".format(*figures[:2], spread, figures[2], outcome)


def _describe(documents: list[dict[str, Any]]) -> str:
    machine, date = documents[0]["machine"], documents[0]["date"]
    repeats = " or ".join(map(str, sorted({document["repeats"] for document in documents})))
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("keras", "jax", "orbax-checkpoint"))
    place = f"{machine['cores']} cores ({machine['cpu']}), {machine['file_system'].split(' ')[0]}"
    return (
        f"Medians of {repeats} runs (lowest .. highest), {date}, {place}, {versions}: "
        "`python benchmarks/bench_stall.py`."
    )


def _spell(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if abs(seconds) >= 0.01 else f"{seconds * 1e3:.1f} ms"


if __name__ == "__main__":
    main()
