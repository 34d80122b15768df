"""Sizes and times as people write them: `"2GB"`, `"120ms"`, `"24h"`."""

from __future__ import annotations

import re

_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]+)\s*", re.ASCII | re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Returns a size in bytes; `"2GB"` is in powers of 1000, `"2GiB"` of 1024.

    Raises:
        ValueError: it is no size, or none at all.
    """
    return round(_parse(text, _BYTES, "a size such as '500MB' or '2GB'"))


def parse_seconds(text: str) -> float:
    """Returns a length of time in seconds.

    Raises:
        ValueError: it is no length of time, or none at all.
    """
    return _parse(text, _SECONDS, "a time such as '120ms', '30s' or '24h'")


def _parse(text: str, units: dict[str, float] | dict[str, int], wanted: str) -> float:
    found = _QUANTITY.fullmatch(text)
    unit = units.get(found[2].lower()) if found else None
    value = float(found[1]) * unit if found and unit else 0.0
    if not value:
        raise ValueError(f"expected {wanted}. Received: {text!r}")
    return value
