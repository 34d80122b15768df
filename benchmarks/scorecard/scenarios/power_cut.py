"""Power cuts, on ext4 and XFS on a loop device: what is not in the journal on the disk by then is gone."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path

from bench import Bench, Trainee
from disks import Disk, mounted, why_not_here
from peers import ALL, PEERS, Peer
from scenario import Scenario, judge_alone
from verdict import Verdict

_KINDS = ("ext4", "xfs")
_WITHIN_SECONDS = 0.3
_PATIENCE_SECONDS = 60.0
_IN_DIRECTORIES = tuple(name for name in ALL if PEERS[name].file is None)

Moment = Callable[[Bench, Disk, Trainee], None]


def cut(bench: Bench, peer: Peer, disk: Disk, moment: Moment, keep: int | None) -> Verdict:
    """Trains on `disk`, cuts its power at the moment, and judges what is there after the next boot.

    The trainee lives on for a moment after the cut, as beside a disk that was pulled out; what it reports then counts.

    Args:
        bench: Where the trial takes place.
        peer: Who saves.
        disk: Mounted, and so it is again afterwards.
        moment: Returns when it has come.
        keep: How many checkpoints stay; `None` is the peer's own number.
    """
    directory = disk.path / "run"
    directory.mkdir()
    subprocess.run(["sync", "--file-system", directory], check=True)  # the folder itself is the user's
    trainee = bench.start(peer, directory, batches=20_000, delay_seconds=0.002, keep=keep or peer.keep)
    moment(bench, disk, trainee)
    disk.cut_power()
    trainee.kill(with_writers=True)
    trainee.hear_out()
    bench.end_all()
    disk.power_on()
    with bench.directory() as copy:
        # The verifier must not be in the way of unmounting.
        trainee.directory = Path(shutil.copytree(directory, copy / "run", symlinks=True))
        return bench.judge(trainee)


def right_after_durable(bench: Bench, disk: Disk, trainee: Trainee) -> None:
    """At once when a save has been reported durable."""
    trainee.hear_until("durable", bench.random.randint(1, 3))


def after_an_unrelated_fsync(bench: Bench, disk: Disk, trainee: Trainee) -> None:
    """Another program has fsynced a file of its own after that, which commits the journal for all."""
    right_after_durable(bench, disk, trainee)
    disk.sync_something_else()


def at_random(bench: Bench, disk: Disk, trainee: Trainee) -> None:
    """At any time while saves go on."""
    trainee.hear_until("durable", 2)
    time.sleep(bench.random.uniform(0, _WITHIN_SECONDS))


def in_retention(bench: Bench, disk: Disk, trainee: Trainee) -> None:
    """When the name of an older checkpoint is just gone, and its files go."""
    trainee.hear_until("durable", 2)
    seen: set[str] = set()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        there = {name for name in os.listdir(trainee.directory) if name.isdecimal()}
        if seen - there:
            return
        seen = there
        time.sleep(0.0005)


def _make_run(kind: str, moment: Moment, keep: int | None) -> Callable[[Bench, Peer, int], Generator[Verdict]]:
    def run(bench: Bench, peer: Peer, count: int) -> Generator[Verdict]:
        with bench.directory() as workplace, mounted(kind, workplace, megabytes=256) as disk:
            for _ in range(count):
                yield judge_alone(bench, lambda: cut(bench, peer, disk, moment, keep))
                shutil.rmtree(disk.path / "run")

    return run


def _make_scenarios(kind: str) -> Iterator[Scenario]:
    about: list[tuple[str, str, Moment, int | None, tuple[str, ...]]] = [
        ("after_durable", "directly after a save was reported durable", right_after_durable, None, ALL),
        ("after_fsync", "after an unrelated fsync, one checkpoint kept", after_an_unrelated_fsync, 1, ALL),
        ("in_retention", "while an older checkpoint is deleted", in_retention, None, _IN_DIRECTORIES),
        ("at_random", "at a random moment", at_random, None, ALL),
    ]
    for name, when, moment, keep, peers in about:
        yield Scenario(
            f"power_cut_{kind}_{name}",
            f"power cut on {kind} {when}",
            _make_run(kind, moment, keep),
            trials=10,
            peer_trials=5,
            peers=peers,
            find_obstacle=partial(why_not_here, kind),
        )


SCENARIOS = tuple(scenario for kind in _KINDS for scenario in _make_scenarios(kind))
