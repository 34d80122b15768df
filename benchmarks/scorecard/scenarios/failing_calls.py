"""The n-th write, fsync, rename or creation of a file fails, for n = 1 until there is none: EIO, or no space."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator

import faulty
from bench import Bench
from faulty import FaultyDisk, faulty_mount
from pausing import at, paused
from peers import Peer
from scenario import Scenario, judge_alone
from verdict import Verdict

_KINDS = {errno.EIO: ("write", "fsync", "rename", "create"), errno.ENOSPC: ("write", "create")}
_MOST = 200
_DEADLINE_SECONDS = 30.0  # ten times as long as it takes


def fail(bench: Bench, peer: Peer, disk: FaultyDisk, kind: str, nth: int, code: int) -> tuple[Verdict, bool]:
    """Saves once, then twice more while the call fails; returns also whether there was such a call."""
    disk.order(read_only=False)  # as usual
    name = f"{kind}-{nth}"
    (disk.path / name).mkdir()
    trainee = bench.start(peer, disk.path / name, batches=15, acts=[at(6)])
    with paused(trainee):
        disk.order(fail=kind, nth=nth, errno=code)
    trainee.hear_out(_DEADLINE_SECONDS)
    bench.settle(_DEADLINE_SECONDS)
    told = disk.order()
    trainee.directory = disk.below / name
    return bench.judge(trainee, wants_submitted=True), told.failed > 0


def _make_run(code: int) -> Callable[[Bench, Peer, int], Generator[Verdict]]:
    def run(bench: Bench, peer: Peer, most: int) -> Generator[Verdict]:
        with bench.directory() as workplace, faulty_mount(bench, workplace) as disk:
            for kind in _KINDS[code]:
                yield from _until_clean(bench, peer, disk, kind, most, code)

    return run


def _until_clean(bench: Bench, peer: Peer, disk: FaultyDisk, kind: str, most: int, code: int) -> Generator[Verdict]:
    for nth in range(1, most + 1):
        has_failed = True

        def trial(nth: int = nth) -> Verdict:
            nonlocal has_failed
            verdict, has_failed = fail(bench, peer, disk, kind, nth, code)
            return verdict

        verdict = judge_alone(bench, trial)
        if not has_failed:
            return
        yield verdict


SCENARIOS = tuple(
    Scenario(
        f"failing_calls_{name}",
        f"{name.upper()} in the n-th {', '.join(_KINDS[code])}, n = 1 to clean",
        _make_run(code),
        trials=_MOST,
        peer_trials=_MOST,
        adds_up=False,
        find_obstacle=faulty.why_not_here,
    )
    for name, code in (("eio", errno.EIO), ("enospc", errno.ENOSPC))
)
