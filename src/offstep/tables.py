"""How the command line shows what it has found: tables and plain lines."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import IO

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE = 10_000  # a pipe gets whole lines


def make_console(file: IO[str] | None = None) -> Console:
    """Returns a console that shows text as it is, never cut short where it is read by a program."""
    file = file or sys.stdout
    width = None if file.isatty() else _WIDE
    return Console(file=file, width=width, markup=False, highlight=False, emoji=False, soft_wrap=width is not None)


def make_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """Returns a table without lines; the columns named in `right` are flushed right."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column in right)
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    return table


def spell_age(seconds: float) -> str:
    """Returns a length of time for people."""
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{max(0.0, seconds) / length:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def spell_number(value: float | None) -> str:
    """Returns a number with few digits; a dash for none."""
    if value is None:
        return "-"
    if isinstance(value, (bool, int)) or not math.isfinite(value):
        return str(value)
    return f"{value:.6g}"
