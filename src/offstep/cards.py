"""What a notebook shows of an object: a small card that suits light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from offstep.figures import spread
from offstep.records import SaveStats
from offstep.reports import Counts
from offstep.words import show_seconds, spell_bytes

Row = tuple[str, str]
"""A name, and words."""

_FRAME = (
    "display:inline-block;max-width:100%;box-sizing:border-box;padding:10px 16px 12px;border-radius:8px;"
    "border:1px solid rgba(128,128,128,.4);font-size:13px;line-height:1.5"
)
_GRID = "display:grid;grid-template-columns:max-content auto;gap:1px 18px;margin-top:4px"


def make_card(kind: str, title: str, rows: Sequence[Row]) -> str:
    """Returns a card as HTML; all arguments are plain text."""
    cells = "".join(
        f'<span style="opacity:.65">{escape(name)}</span><span style="overflow-wrap:anywhere">{escape(words)}</span>'
        for name, words in rows
    )
    return (
        f'<div style="{_FRAME}"><span style="opacity:.65">{escape(kind)}</span> '
        f'<b style="overflow-wrap:anywhere">{escape(title)}</b><div style="{_GRID}">{cells}</div></div>'
    )


def describe_saves(stats: Sequence[SaveStats], counts: Counts) -> list[Row]:
    """Returns what the saves of a run have come to, and have cost."""
    rows = [("saves", _describe_counts(counts))]
    durable = [one for one in stats if one.durable_seconds is not None]
    if durable:
        newest = max(durable, key=lambda one: one.step)
        rows.append(("newest durable", f"step {newest.step:,}, {newest.path}"))
    if stalls := [one.stall_seconds for one in stats if not one.skipped]:
        rows.append(("stall", _describe_spread(stalls)))
    if durable:
        after = [(one.durable_seconds or 0.0) - one.compute_seconds for one in durable]
        rows.append(("durable after", _describe_spread(after)))
        rows.append(("written", spell_bytes(sum(one.written_bytes or 0 for one in durable))))
    return rows


def _describe_spread(lengths: Sequence[float]) -> str:
    found = spread(lengths)
    return f"{show_seconds(found.median)} in the median, {show_seconds(found.most)} at most"


def _describe_counts(counts: Counts) -> str:
    on_the_way = counts.requested - counts.durable - counts.failed - counts.skipped
    parts = [(on_the_way, "on the way"), (counts.failed, "failed"), (counts.skipped, "skipped")]
    words = [f"{counts.durable:,} durable", *(f"{number:,} {word}" for number, word in parts if number)]
    return ", ".join(words) if counts.requested else "none yet"
