"""One bit flipped at rest, and files cut short: wrong values must not come back without an error."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from random import Random
from typing import Any

from bench import Bench, Ended, Hung, Process
from damage import choose_file, choose_flip, cut_short, flipped
from model import Shape
from oracle import Found
from peers import ALL, OURS, PEERS, Peer
from scenario import Scenario
from verdict import Verdict

_SHAPE = Shape(branches=2, width=4_000)  # the small parts of a checkpoint matter as well
_STEP = 5
_PATIENCE_SECONDS = 60.0
_UNCHECKED = tuple(name for name in ALL if PEERS[name].reader == "weights")

Damage = Callable[[Random, Path], AbstractContextManager[str]]


@contextmanager
def _flip(chance: Random, checkpoint: Path) -> Iterator[str]:
    """In the block one bit is another one."""
    flip = choose_flip(chance, checkpoint)
    with flipped(flip):
        yield f"bit {flip.bit} of byte {flip.offset} of {flip.path.name}"


@contextmanager
def _cut(chance: Random, checkpoint: Path) -> Iterator[str]:
    """In the block the end of one file is missing."""
    path = choose_file(chance, checkpoint)
    size_bytes = chance.randrange(path.stat().st_size)
    with cut_short(path, size_bytes):
        yield f"{path.name} has only {size_bytes} bytes"


@contextmanager
def _checkpoint(bench: Bench, peer: Peer, **options: Any) -> Iterator[tuple[Path, Path]]:
    """Yields a directory with one checkpoint that can be read, and the checkpoint."""
    with bench.directory() as workplace:
        directory = workplace / "run"
        directory.mkdir()
        trainee = bench.start(peer, directory, shape=_SHAPE, batches=_STEP, save_every=_STEP, options=options)
        trainee.hear_out()
        bench.settle()
        states = [found.state for found in bench.find(peer, directory, _SHAPE)]
        assert states == ["equal"], f"the checkpoint is not whole to begin with: {states} {trainee.errors}"
        yield directory, directory / (peer.file or str(_STEP))


def _read_damaged(damage: Damage, **options: Any) -> Callable[[Bench, Peer, int], Generator[Verdict]]:
    def run(bench: Bench, peer: Peer, count: int) -> Generator[Verdict]:
        with _checkpoint(bench, peer, **options) as (directory, checkpoint):
            for _ in range(count):
                with damage(bench.random, checkpoint) as what:
                    verdict = _judge(bench, peer, directory, what)
                yield verdict

    return run


def _judge(bench: Bench, peer: Peer, directory: Path, what: str) -> Verdict:
    """Wrong values without an error are silent; an error, or the right values, are not."""
    try:
        found = bench.find(peer, directory, _SHAPE)
    except Ended:  # the reader has crashed, which nobody takes for a success
        bench.forget_verifier(peer)
        return Verdict()
    except Hung as error:
        bench.forget_verifier(peer)
        return Verdict(is_hung=True, detail=f"{what}: {error}")
    wrong = [each for each in found if each.state == "wrong"]
    return Verdict(is_silent=bool(wrong), detail=f"{what}: {_describe(wrong)}")


def _describe(found: list[Found]) -> str:
    return ", ".join(f"{each.name} is {each.state}: {each.detail}" for each in found)


def _verify_damaged(damage: Damage) -> Callable[[Bench, Peer, int], Generator[Verdict]]:
    """What `verify` finds nothing wrong with must be read with its right values: padding may be damaged."""

    def run(bench: Bench, peer: Peer, count: int) -> Generator[Verdict]:
        with _checkpoint(bench, peer) as (directory, checkpoint):
            checker = bench.bear("checker", {})
            with bench.served_by(checker.pid):
                assert _ask(checker, checkpoint) == "ok"
                for _ in range(count):
                    with damage(bench.random, checkpoint) as what:
                        is_passed = _ask(checker, checkpoint) == "ok"
                        found = bench.find(peer, directory, _SHAPE) if is_passed else []
                    is_silent = is_passed and [each.state for each in found] != ["equal"]
                    yield Verdict(is_silent=is_silent, detail=f"{what} passes: {_describe(found)}")
                assert _ask(checker, checkpoint) == "ok"
            checker.close()

    return run


def _ask(checker: Process, checkpoint: Path) -> str:
    checker.write(f"{checkpoint}\n")
    return checker.read_line(_PATIENCE_SECONDS)


SCENARIOS = (
    Scenario(
        "flipped_bit",
        "one bit is flipped at rest, stock readers",
        _read_damaged(_flip),
        trials=1_000,
        peer_trials=1_000,
        quick=20,
        peers=tuple(name for name in ALL if name not in _UNCHECKED),
    ),
    Scenario(
        "flipped_bit_weights",
        "one bit of a `.weights.h5` is flipped at rest, stock Keras, which checks nothing there",
        _read_damaged(_flip),
        trials=1_000,
        peer_trials=1_000,
        quick=20,
        peers=_UNCHECKED,
    ),
    Scenario(
        "flipped_bit_checksums",
        "one bit of a `.weights.h5` with `hdf5_checksums=True` is flipped at rest, stock Keras",
        _read_damaged(_flip, hdf5_checksums=True),
        trials=1_000,
        quick=20,
        peers=("offstep_weights",),
    ),
    Scenario(
        "flipped_bit_verify",
        "one bit is flipped at rest, offstep.verify",
        _verify_damaged(_flip),
        trials=1_000,
        quick=100,
        peers=OURS,
    ),
    Scenario(
        "cut_short",
        "a file is cut short, stock readers",
        _read_damaged(_cut),
        trials=200,
        peer_trials=200,
        quick=20,
    ),
    Scenario(
        "cut_short_verify",
        "a file is cut short, offstep.verify",
        _verify_damaged(_cut),
        trials=200,
        quick=50,
        peers=OURS,
    ),
)
