"""The command line, run in this process, and what is wrong with a run that is refused."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offstep import cli


@dataclass(frozen=True)
class Run:
    """One command that has ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:  # JSON
        return json.loads(self.out, parse_constant=_refuse)


def offstep(*arguments: str | Path) -> Run:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as ending:  # argparse
            code = int(str(ending.code))
    return Run(code, out.getvalue(), err.getvalue())


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
