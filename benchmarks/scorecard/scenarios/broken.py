"""The newest checkpoint is broken: whoever goes on gets the one before, and is told."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path

from bench import DEADLINE_SECONDS, Bench
from model import Shape
from peers import DIRECTORIES, OURS, Peer
from scenario import Scenario, judge_hanging
from verdict import Ended, Skipped, Verdict

_SAVED = (5, 10, 15)


def _remove(file: Path) -> None:
    file.unlink()


def _cut(file: Path) -> None:
    with file.open("r+b") as open_file:
        open_file.truncate(file.stat().st_size // 2)


def _empty(file: Path) -> None:
    with file.open("r+b") as open_file:
        open_file.truncate(0)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


_DAMAGES: tuple[Callable[[Path], None], ...] = (_cut, _remove, _empty, _flip)


def _break_newest(bench: Bench, peer: Peer, count: int) -> Generator[Verdict]:
    """Each of the files of the newest, in the order of their sizes, is damaged in each way."""
    with bench.directory() as directory:
        each = peer.with_each_step()
        trainee = bench.start(peer, directory, batches=_SAVED[-1], keep=len(_SAVED), file=None)
        trainee.hear_out()
        newest = directory / f"{_SAVED[-1]}{each.suffix}"
        files = [newest] if newest.is_file() else [path for path in newest.rglob("*") if path.is_file()]
        files.sort(key=lambda path: (-path.stat().st_size, path))
        words, errors = _resume(bench, peer, directory)
        if words != ["restored", str(_SAVED[-1])]:
            raise Skipped(f"the newest cannot be restored though it is whole: {words} {errors[-200:]}")
        damages = _DAMAGES if len(files) > 1 else [damage for damage in _DAMAGES if damage is not _remove]
        cases = [(file, damage) for file in files for damage in damages if damage is _remove or file.stat().st_size]
        for file, damage in cases[:count]:
            yield judge_hanging(lambda: _try(bench, peer, directory, file, damage))  # noqa: B023


def _try(bench: Bench, peer: Peer, directory: Path, file: Path, damage: Callable[[Path], None]) -> Verdict:
    before = file.read_bytes()
    damage(file)
    try:
        words, errors = _resume(bench, peer, directory)
    finally:
        file.write_bytes(before)
    what = f"{damage.__name__} {file.relative_to(directory)}: {' '.join(words) or errors[-150:]}"
    if words[:1] == ["wrong"]:
        return Verdict(is_silent=True, detail=what)
    if words == ["restored", str(_SAVED[-1])]:  # it read all that it needed, and checked it
        return Verdict()
    if words == ["restored", str(_SAVED[-2])]:
        return Verdict(is_unreported=not errors.strip(), detail=what)
    return Verdict(fault="the one before is not restored", detail=what)


def _resume(bench: Bench, peer: Peer, directory: Path) -> tuple[list[str], str]:
    process = bench.bear("resumer", {"peer": peer.name, "directory": str(directory), "shape": asdict(Shape())})
    words: list[str] = []
    try:
        while words[:1] not in (["restored"], ["wrong"]):
            words = process.read_line().split()
    except Ended:
        words = ["error"]
    process.wait(DEADLINE_SECONDS)
    errors = process.errors
    process.close()
    return words, errors


_PEERS = tuple(dict.fromkeys((*OURS, *DIRECTORIES)))
SCENARIOS = (Scenario("newest_broken", "the newest is damaged", _break_newest, 60, 60, 4, _PEERS, adds_up=False),)
