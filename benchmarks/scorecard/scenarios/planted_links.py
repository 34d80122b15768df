"""Links that somebody has planted where a checkpoint shall go, and folders that are links themselves."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench import Bench
from peers import Peer
from scenario import Scenario, repeat
from verdict import Verdict

_FIRST_STEP = 5
_DEADLINE_SECONDS = 45.0
_TREASURE = b"of somebody else" * 4096
_MARK = ".orbax-checkpoint-tmp"

# Where a link is planted, relative to the folder, for a peer with one file and for one with directories of steps.
_PLACES: dict[str, Callable[[Peer], list[str]]] = {
    "target": lambda peer: [peer.file or str(_FIRST_STEP)],
    "temporary": lambda peer: [
        f"{peer.file or _FIRST_STEP}{suffix}" for suffix in (_MARK, f"{_MARK}-offstep-0", ".tmp", "~")
    ],
    "lock": lambda peer: [_name_lock(peer)],
}


def _name_lock(peer: Peer) -> str:
    from offstep.ownership import lock_path

    return lock_path(Path(), peer.file or "").name


def _plant(folder: Path, name: str, victim: Path, *, is_directory: bool) -> None:
    if is_directory:
        victim.mkdir(exist_ok=True)
        (victim / "treasure").write_bytes(_TREASURE)
    else:
        victim.write_bytes(_TREASURE)
    (folder / name).symlink_to(victim)


def _fingerprint(place: Path) -> dict[str, int]:
    """Returns the checksums of what is below, by path."""
    files = (path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(place)): zlib.crc32(path.read_bytes()) for path in files}


def _save_beside_links(bench: Bench, peer: Peer, number: int) -> Verdict:
    """What the links lead to stays as it is; the saves succeed, or somebody is told."""
    with bench.directory() as workplace:
        folder, elsewhere = workplace / "run", workplace / "elsewhere"
        folder.mkdir()
        elsewhere.mkdir()
        place = list(_PLACES)[number % len(_PLACES)]
        for index, name in enumerate(_PLACES[place](peer)):
            is_directory = peer.file is None and place != "lock"
            _plant(folder, name, elsewhere / str(index), is_directory=is_directory)
        before = _fingerprint(elsewhere)
        trainee = bench.start(peer, folder, batches=3 * _FIRST_STEP)
        status = trainee.hear_out(_DEADLINE_SECONDS)
        bench.settle(_DEADLINE_SECONDS)
        after = _fingerprint(elsewhere)
        if after != before:
            changed = [name for name in before | after if before.get(name) != after.get(name)]
            return Verdict(lost_bytes=len(_TREASURE), detail=f"{place}: what a link leads to was changed: {changed}")
        if status != 0 and not trainee.claims.submitted and trainee.errors:
            return Verdict(detail=f"{place}: refused")
        return bench.judge(trainee, wants_submitted=True)


def _save_into_a_link(bench: Bench, peer: Peer, number: int) -> Verdict:
    """A folder may be a link, as on clusters: the folder itself, or one above it."""
    with bench.directory() as workplace:
        real = workplace / "real"
        (real / "run").mkdir(parents=True)
        link = workplace / "link"
        if number % 2:
            link.symlink_to(real)
            link = link / "run"
        else:
            link.symlink_to(real / "run")
        trainee = bench.start(peer, link, batches=3 * _FIRST_STEP)
        trainee.hear_out(_DEADLINE_SECONDS)
        bench.settle(_DEADLINE_SECONDS)
        verdict = bench.judge(trainee, wants_submitted=True)
        return verdict if trainee.claims.is_done else replace(verdict, fault=f"refused: {trainee.errors[-200:]}")


SCENARIOS = (
    Scenario(
        "planted_links",
        "links in the place of the target, of temporary names, of the lock",
        repeat(_save_beside_links),
        trials=6,
        quick=3,
        adds_up=False,
    ),
    Scenario(
        "linked_folder", "the folder is a link, or is below one", repeat(_save_into_a_link), 4, 2, 2, adds_up=False
    ),
)
