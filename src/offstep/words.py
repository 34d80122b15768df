"""Lengths of time, sizes, shares and counts for people."""

from __future__ import annotations

import math

TIME_UNITS = ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s"), (60.0, "min"), (3600.0, "h"), (86_400.0, "d"))
"""In seconds, with their names."""

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
"""The first stands for what there is not."""

_SIZES = ("B", "kB", "MB", "GB", "TB")
_PAIRS = ((TIME_UNITS[5], TIME_UNITS[4]), (TIME_UNITS[4], TIME_UNITS[3]), (TIME_UNITS[3], TIME_UNITS[2]))


def show_seconds(seconds: float) -> str:
    """Returns a length of time with three digits and its unit, or in two units; a dash for none."""
    if not math.isfinite(seconds):
        return DASH
    for (size, unit), (part_size, part_unit) in _PAIRS:
        if seconds >= size:
            whole, rest = divmod(round(seconds / part_size), round(size / part_size))
            return f"{whole:,} {unit} {rest} {part_unit}" if rest else f"{whole:,} {unit}"
    size, unit = next(((s, u) for s, u in reversed(TIME_UNITS) if abs(seconds) >= s * 0.9995), TIME_UNITS[0])
    return f"{show_digits(seconds / size)} {unit}" if seconds else "0 s"


def show_clock(seconds: float) -> str:
    """Returns a length of time as hours, minutes and seconds."""
    minutes, rest = divmod(max(0.0, seconds), 60)
    return f"{int(minutes // 60)}:{int(minutes % 60):02d}:{int(rest):02d}"


def show_share(share: float) -> str:
    """Returns a share in percent with few digits."""
    return "0 %" if not share else f"{show_digits(100 * share)} %"


def show_count(count: int, noun: str, plural: str | None = None) -> str:
    """Returns a number with its noun."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def show_digits(value: float) -> str:
    """Returns a number with three digits, two below 1."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    text = f"{value:.3g}" if abs(value) >= 1 else f"{value:.2g}"
    return f"{float(text):f}".rstrip("0").rstrip(".")


def spell_bytes(count: int) -> str:
    """Returns a number of bytes for people, in powers of 1000."""
    size = float(count)
    for unit in _SIZES:
        if size < 999.5 or unit == _SIZES[-1]:
            return f"{count} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError
