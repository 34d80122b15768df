"""Disks that are full, read-only, gone, slow or hung while a run saves."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import faulty
from bench import Bench
from disks import Disk, mounted, why_not_here
from faulty import faulty_mount
from model import Shape
from oracle import Claims
from pausing import at, paused
from peers import Peer
from scenario import Scenario, judge_alone, repeat
from verdict import Verdict

_EVERY = 5  # batches from save to save
_BEFORE = 2 * _EVERY  # two checkpoints are there when the trouble begins
_HUNG_SECONDS = (5, 60)  # in the first trial, in the second
_DEADLINE_SECONDS = 45.0  # ten times as long as a trial takes
_SLOW_BYTES_PER_SECOND = 1e6
_SLOW_SHAPE = Shape(width=12_500)  # 200 KB
_SLOW_SAVES = 50
_SLOW_PATIENCE_SECONDS = 200.0

Trouble = Callable[[Bench, Disk], AbstractContextManager[None]]


def _options(peer: Peer) -> dict[str, Any]:
    """Ours tries again for 30 s unless told; what comes after that is what is looked at."""
    return {"retry_seconds": 1.0} if peer.is_ours else {}


# ------------------------------------------------------------------------------------------- no space, or no inodes


def _no_space(bench: Bench, disk: Disk) -> AbstractContextManager[None]:
    return disk.full()


def _no_inodes(bench: Bench, disk: Disk) -> AbstractContextManager[None]:
    return disk.without_inodes(spare=bench.random.randrange(8))


def _train_in(bench: Bench, peer: Peer, disk: Disk, trouble: Trouble, saves: int) -> Verdict:
    """Makes two checkpoints, then trains for some more saves in trouble."""
    directory = disk.path / "run"
    directory.mkdir()
    batches = _BEFORE + saves * _EVERY
    trainee = bench.start(peer, directory, batches=batches, acts=[at(_BEFORE + 1)], options=_options(peer))
    with ExitStack() as stack:
        with paused(trainee):
            stack.enter_context(trouble(bench, disk))
        trainee.hear_out(_DEADLINE_SECONDS)
        bench.settle(_DEADLINE_SECONDS)
    return bench.judge(trainee, wants_submitted=True)


def _make_run(
    kind: str, trouble: Trouble, saves: int, inodes: int | None = None
) -> Callable[[Bench, Peer, int], Generator[Verdict]]:
    def run(bench: Bench, peer: Peer, count: int) -> Generator[Verdict]:
        with bench.directory() as workplace, mounted(kind, workplace, inodes=inodes) as disk:
            for _ in range(count):
                yield judge_alone(bench, lambda: _train_in(bench, peer, disk, trouble, saves))
                shutil.rmtree(disk.path / "run")

    return run


# ------------------------------------------------------------------------------------------------ read-only, or gone


def _become_read_only(bench: Bench, peer: Peer, count: int) -> Generator[Verdict]:
    def trial(number: int) -> Verdict:
        disk.order(read_only=False)
        (disk.path / str(number)).mkdir()
        trainee = bench.start(peer, disk.path / str(number), batches=4 * _EVERY, acts=[at(_BEFORE + 1)])
        with paused(trainee):
            disk.order(read_only=True)
        trainee.hear_out(_DEADLINE_SECONDS)
        bench.settle(_DEADLINE_SECONDS)
        trainee.directory = disk.below / str(number)
        return bench.judge(trainee, wants_submitted=True)

    with bench.directory() as workplace, faulty_mount(bench, workplace) as disk:
        for number in range(count):
            yield judge_alone(bench, lambda number=number: trial(number))


def _delete_directory(bench: Bench, peer: Peer, number: int) -> Verdict:
    """What was there is gone with it; what is saved after that must be there, or somebody be told."""
    with bench.directory() as workplace:
        directory = workplace / "run"
        directory.mkdir()
        trainee = bench.start(peer, directory, batches=4 * _EVERY, acts=[at(_BEFORE + 1)])
        with paused(trainee):
            shutil.rmtree(directory)
        trainee.hear_out(_DEADLINE_SECONDS)
        bench.settle(_DEADLINE_SECONDS)
        directory.mkdir(exist_ok=True)
        before = trainee.claims
        late = [[step for step in steps if step > _BEFORE] for steps in (before.submitted, before.durable)]
        trainee.claims = Claims(*late, is_done=before.is_done)
        return bench.judge(trainee, wants_submitted=True)


# ------------------------------------------------------------------------------------------------------ slow, or hung


def _save_slowly(bench: Bench, peer: Peer, count: int) -> Generator[Verdict]:
    def trial(number: int) -> Verdict:
        disk.order(bytes_per_second=_SLOW_BYTES_PER_SECOND)
        (disk.path / str(number)).mkdir()
        batches = _SLOW_SAVES * _EVERY
        trainee = bench.start(peer, disk.path / str(number), shape=_SLOW_SHAPE, batches=batches)
        trainee.hear_out(_SLOW_PATIENCE_SECONDS)
        bench.settle(_DEADLINE_SECONDS)
        trainee.directory = disk.below / str(number)
        verdict = bench.judge(trainee, wants_submitted=True)
        if not verdict.fault and len(trainee.claims.submitted) < _SLOW_SAVES:
            return Verdict(is_silent=True, detail=f"{len(trainee.claims.submitted)} of {_SLOW_SAVES} saves were made")
        return verdict

    with bench.directory() as workplace, faulty_mount(bench, workplace) as disk:
        for number in range(count):
            yield judge_alone(bench, lambda number=number: trial(number))


def _hang(bench: Bench, peer: Peer, count: int) -> Generator[Verdict]:
    def trial(seconds: float) -> Verdict:
        directory = disk.path / "run"
        directory.mkdir()
        trainee = bench.start(peer, directory, batches=6 * _EVERY, acts=[at(_BEFORE + 1)])
        with ExitStack() as stack:
            with paused(trainee):
                stack.enter_context(disk.hung())
            time.sleep(seconds)
        trainee.hear_out(_DEADLINE_SECONDS)
        bench.settle(_DEADLINE_SECONDS)
        return bench.judge(trainee, wants_submitted=True)

    with bench.directory() as workplace, mounted("ext4", workplace) as disk:
        for seconds in _HUNG_SECONDS[:count]:
            yield judge_alone(bench, lambda seconds=seconds: trial(seconds))
            shutil.rmtree(disk.path / "run")


SCENARIOS = (
    Scenario(
        "disk_full_middle",
        "ext4 is full from the third save on",
        _make_run("ext4", _no_space, 3),
        trials=10,
        find_obstacle=partial(why_not_here, "ext4"),
    ),
    Scenario(
        "disk_full_last",
        "tmpfs is full at the last save",
        _make_run("tmpfs", _no_space, 1),
        trials=10,
        find_obstacle=partial(why_not_here, "tmpfs"),
    ),
    Scenario(
        "inodes_exhausted",
        "ext4 has no more inodes from the third save on",
        _make_run("ext4", _no_inodes, 3, inodes=256),
        trials=10,
        find_obstacle=partial(why_not_here, "ext4"),
    ),
    Scenario(
        "read_only",
        "the file system becomes read-only in mid-run",
        _become_read_only,
        find_obstacle=faulty.why_not_here,
    ),
    Scenario("directory_deleted", "the directory is deleted in mid-run", repeat(_delete_directory)),
    Scenario(
        "slow_disk",
        "the disk takes 1 MB/s, for 50 saves",
        _save_slowly,
        trials=2,
        peer_trials=1,
        find_obstacle=faulty.why_not_here,
    ),
    Scenario(
        "hung_disk",
        "the disk hangs for 5 s, and in another trial for 60 s",
        _hang,
        trials=2,
        peer_trials=2,
        adds_up=False,
        find_obstacle=partial(why_not_here, "ext4"),
    ),
)
