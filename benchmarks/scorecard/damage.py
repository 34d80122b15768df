"""Damage at rest: flipped bits and lost ends, done to the files of a checkpoint and undone again."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Flip:
    """One bit of one file.

    Attributes:
        path: The file.
        offset: Of the byte in it.
        bit: Of the byte, 0 to 7.
    """

    path: Path
    offset: int
    bit: int

    def apply(self) -> None:
        """Flips the bit; a second time undoes it."""
        with self.path.open("r+b", buffering=0) as file:
            [byte] = os.pread(file.fileno(), 1, self.offset)
            os.pwrite(file.fileno(), bytes([byte ^ (1 << self.bit)]), self.offset)


def list_files(checkpoint: Path) -> list[Path]:
    """Returns the files of a checkpoint that are not empty, sorted: itself, if it is one file."""
    if checkpoint.is_file():
        return [checkpoint]
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)


def choose_file(chance: random.Random, checkpoint: Path) -> Path:
    """Returns a file: by its size half of the time, as a disk would, else each alike, for the small ones matter too."""
    files = list_files(checkpoint)
    if chance.random() < 0.5:
        return chance.choice(files)
    return chance.choices(files, [path.stat().st_size for path in files])[0]


def choose_flip(chance: random.Random, checkpoint: Path) -> Flip:
    """Returns a random bit of a checkpoint."""
    path = choose_file(chance, checkpoint)
    return Flip(path, chance.randrange(path.stat().st_size), chance.randrange(8))


@contextlib.contextmanager
def flipped(flip: Flip) -> Iterator[None]:
    """In the block the bit is the other one."""
    flip.apply()
    try:
        yield
    finally:
        flip.apply()


@contextlib.contextmanager
def cut_short(path: Path, size_bytes: int) -> Iterator[None]:
    """In the block the file has only its first `size_bytes`."""
    whole = path.read_bytes()
    os.truncate(path, size_bytes)
    try:
        yield
    finally:
        path.write_bytes(whole)
