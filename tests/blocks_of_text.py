"""The code blocks of a page of Markdown, as a reader would run them."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\w+\.py)\n")


@dataclass(frozen=True)
class Block:
    """A block of code; `file` is the name that its first line gives it, if it does."""

    language: str
    code: str
    file: str | None = None


def find_blocks(text: str) -> list[Block]:
    """Returns all blocks; of a difference only what is there afterwards."""
    return [_make(language, code) for language, code in _BLOCK.findall(text)]


def _make(language: str, code: str) -> Block:
    if language == "diff":
        lines = code.splitlines(keepends=True)
        return Block("python", "".join(line[1:] or "\n" for line in lines if not line.startswith("-")))
    named = _FILE.match(code) if language == "python" else None
    return Block(language, code, named[1] if named else None)
