"""All benchmarks, one after another: one JSON file, one text file and the plots.

    pip install 'offstep[benchmarks]' && python benchmarks/run_all.py
    python benchmarks/run_all.py --quick             # does everything work?
    python benchmarks/run_all.py --only stall frozen

Writes `benchmarks/results/<date>-<machine>.json` (every run of every benchmark that compares peers, by its name), the
tables as `.txt` beside it, and `docs/images/*.svg`. With `--quick` all of it goes below `--dir`. Takes about an hour;
nothing else should run meanwhile. A benchmark that fails does not stop the others, but the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command import DEFAULT_DIRECTORY
from machine import describe_machine, free_path
from report import RESULTS

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parent / "docs" / "images"
# Name → arguments; those with peers say where their JSON is.
BENCHMARKS: dict[str, Sequence[str]] = {
    "copy": (),
    "stall": (),
    "durable": (),
    "phases": (),
    "small_leaves": (),
    "frequency": (),
    "memory": (),
    "restore": (),
    "memory_tier": (),
    "frozen": (),
    "writer": (),
    "safety": (),
}
WITHOUT_OPTIONS = ("copy",)  # takes neither --quick nor --dir
JSON_LINE = re.compile(r"^all runs: (\S+\.json)$", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few saves, one repeat: does everything work?")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIRECTORY, help="where checkpoints go (%(default)s)")
    arguments = parser.parse_args()
    arguments.dir.mkdir(parents=True, exist_ok=True)
    results = arguments.dir if arguments.quick else RESULTS
    outputs = {name: run(name, arguments.dir, quick=arguments.quick) for name in arguments.only}
    path = write(results, describe_machine(arguments.dir), outputs)
    print(f"everything: {path}")
    draw(json.loads(path.read_text())["benchmarks"], arguments.dir / "images" if arguments.quick else IMAGES)
    failed = [name for name, text in outputs.items() if text is None]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run(name: str, directory: Path, *, quick: bool) -> str | None:
    """Runs one benchmark and returns what it printed, which is shown as well; `None` if it failed."""
    options = [] if name in WITHOUT_OPTIONS else ["--dir", str(directory), *(["--quick"] if quick else [])]
    command = [sys.executable, str(HERE / f"bench_{name}.py"), *BENCHMARKS[name], *options]
    print(f"--- {' '.join(command[1:])}", flush=True)
    # The terminal's width must not cut the tables and paths.
    environment = os.environ | {"COLUMNS": "300"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return "".join(lines) if process.returncode == 0 else None


def write(results: Path, machine: dict[str, Any], outputs: dict[str, str | None]) -> Path:
    """Joins the JSON files that the benchmarks wrote into one, which replaces them, and returns its path."""
    path = free_path(results, machine["name"])
    benchmarks = {}
    for name, text in outputs.items():
        for part in JSON_LINE.findall(text or ""):
            benchmarks[name] = json.loads(Path(part).read_text())
            Path(part).unlink()
    tables = {name: text for name, text in outputs.items() if text is not None}
    path.write_text(json.dumps({"machine": machine, "benchmarks": benchmarks}, indent=1))
    path.with_suffix(".txt").write_text("".join(f"=== bench_{name}\n{text}\n" for name, text in tables.items()))
    return path


def draw(benchmarks: dict[str, Any], images: Path) -> None:
    """Draws what has been measured; without matplotlib it says so."""
    try:
        import plot
    except ModuleNotFoundError as error:
        print(f"no plots: {error}")
        return
    images.mkdir(parents=True, exist_ok=True)
    for name, data in benchmarks.items():
        if name in {"stall", "small_leaves", "frequency"}:
            figure = plot.plot_overhead(data) if name == "frequency" else plot.plot_bars(data)
            figure.savefig(images / f"{name}.svg", bbox_inches="tight")
            print(images / f"{name}.svg")


if __name__ == "__main__":
    main()
