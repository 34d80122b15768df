"""Checks checkpoints with `offstep.verify`, one a line on stdin, and answers with a line: `ok`, or what is wrong."""

from __future__ import annotations

import sys
from typing import Any


def main(_: dict[str, Any]) -> None:
    """Serves until stdin ends."""
    import offstep

    for line in sys.stdin:
        try:
            report = offstep.verify(line.rstrip("\n"))
            answer = "ok" if report.ok else f"damaged: {report.problems[0]}"
        except (OSError, ValueError) as error:
            answer = f"{type(error).__name__}: {error}"
        print(answer.replace("\n", " "), flush=True)
