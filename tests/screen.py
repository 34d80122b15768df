"""What a terminal shows of what is written to it: as much of one as Keras's bar and our line need."""

from __future__ import annotations

import re

_PIECE = re.compile(r"\x1b\[(\d*)([A-Za-z])|\x1b[78]|([\n\r\b])|([^\x1b\n\r\b]+)")


def show_on_screen(written: str, *, width: int = 100) -> list[str]:
    """Returns the lines of an endless screen; raises an error for what it does not know."""
    lines: list[list[str]] = [[]]
    row = column = place = 0
    while place < len(written):
        piece = _PIECE.match(written, place)
        assert piece is not None, repr(written[place : place + 20])
        place = piece.end()
        number, code, control, text = piece.groups()
        if text is not None:
            for letter in text:
                if column == width:
                    row, column = row + 1, 0
                lines += [[] for _ in range(row + 1 - len(lines))]
                lines[row] += [" "] * (column + 1 - len(lines[row]))
                lines[row][column] = letter
                column += 1
        elif control == "\n":
            row, column = row + 1, 0  # the terminal's driver adds the carriage return
            lines += [[] for _ in range(row + 1 - len(lines))]
        elif control == "\r":
            column = 0
        elif control == "\b":
            column = max(0, column - 1)
        elif code == "A":
            row = max(0, row - int(number or 1))
        elif code == "K":
            assert number == "2"
            lines[row] = []
        else:
            assert code == "m", piece.group()
    return ["".join(line).rstrip() for line in lines]
