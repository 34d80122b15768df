"""States that span several training processes, saved into an object store: whole steps or none, and one commit."""

from __future__ import annotations

import json
import mmap
import re
import struct
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import joint
import numpy as np
import pytest
from fault_proxy import STATUSES, Proxy
from object_stores import Server, below, download, gs_only, list_objects, proxy, run, s3_only, store, through
from slots import cut_into_chunks
from test_distributed_faults import ARGUMENTS, assert_failed
from test_joint import assert_stock_orbax_restores, list_expected
from test_store_faults import PHASES, is_marker

import offstep
from offstep import catalog, manifest
from offstep._native import crc32c
from offstep.formats import FORMATS, orbax_merged, orbax_share_objects
from offstep.records import Job, Leaf, Share
from offstep.recovery import sweep_store
from offstep.shares import share_out
from offstep.stores.address import parse_address
from offstep.stores.client import Store
from offstep.stores.path import open_place

__all__ = ["proxy", "run", "store"]  # fixtures


def save(address: str, steps: list[int], **arguments: Any) -> list[list[str]]:
    """Saves steps by two processes, and returns the failures that each was told of."""
    told = joint.run("joint_trees.py", 2, address, do="save", steps=steps, arguments=arguments)
    return [report["failures"] for report in told]


def list_steps(address: str) -> list[int]:
    return catalog.list_steps(open_place(address))


def assert_whole(address: str, step: int) -> None:
    for name, values in list_expected(step).items():
        assert np.array_equal(offstep.read(below(address, str(step)), name), values), name


@s3_only
def test_two_processes_save_steps_that_one_and_two_restore_and_stock_orbax_from_a_copy(
    run: str, tmp_path: Path
) -> None:
    assert save(run, [1, 2, 3], max_to_keep=2) == [[], []]
    assert list_steps(run) == [2, 3]
    assert {name.partition("/")[0] for name in list_objects(run)} == {"2", "3"}
    assert str(offstep.latest(run)) == below(run, "3")
    report = offstep.verify(run)
    assert report.ok, report.problems
    for count in (1, 2):
        told = joint.run("joint_trees.py", count, run, do="restore", steps=[3], newest=True)
        assert told == [{"step": 3, "wrong": []}] * count
    copy = download(run, tmp_path / "copy")
    assert offstep.verify(copy).ok
    written = manifest.read(copy / "3")
    assert written is not None
    assert (written.metrics, written.nonfinite) == ({"loss": 1.5}, 0)
    assert len(list((copy / "3" / "pytree").glob("ocdbt.process_*/d/*"))) == 2
    assert_stock_orbax_restores(copy)


@gs_only
def test_keras_trains_on_two_processes_and_saves_to_a_bucket(run: str, tmp_path: Path) -> None:
    filepath = below(run, "{step}")
    told = joint.run("joint_keras.py", 2, tmp_path, do="train", kind="data", batches=4, filepath=filepath)
    assert told == [{"durable": 2, "failed": 0}] * 2
    assert list_steps(run) == [2, 4]
    download(run, tmp_path / "root")
    assert joint.run("joint_keras.py", 1, tmp_path, do="load", steps=[4]) == [{"wrong": []}]


@gs_only
def test_two_tiers_are_for_several_processes_too(run: str, tmp_path: Path) -> None:
    arguments = {"local": str(tmp_path / "root"), "upload_every": 2, "local_max_to_keep": 1}
    options = {"do": "train", "kind": "data", "batches": 8, "filepath": below(run, "{step}"), "arguments": arguments}
    told = joint.run("joint_keras.py", 2, tmp_path, **options)
    assert told == [{"durable": 4, "failed": 0}] * 2
    assert catalog.list_steps(tmp_path / "root")[-1] == 8
    assert list_steps(run) == [4, 8]
    assert offstep.verify(run).ok


def suffer(address: str, fault: dict[str, Any], *, process: int = 1, step: int = 2) -> list[joint.Trainer]:
    """Saves a step while one process has a fault; returns the processes, which have ended."""
    options: list[dict[str, Any]] = [{"do": "suffer", "steps": [step], "arguments": ARGUMENTS} for _ in range(2)]
    options[process] |= {"fault": fault}
    trainers = joint.start("joint_trees.py", 2, address, options)
    try:
        trainers[1 - process].read()
        trainers[process].go_on()
        trainers[process].read()
        for trainer in reversed(trainers):  # with the first one JAX's service goes
            trainer.end()
    finally:
        for trainer in trainers:
            trainer.kill()
    return trainers


@gs_only
def test_a_process_that_dies_before_it_reports_leaves_nothing_and_the_next_run_saves(run: str) -> None:
    healthy, _ = suffer(run, {"call": "put", "does": "SIGKILL"})
    assert_failed(healthy, "process 1 of 2 has not reported its share within 3 s")
    assert list_objects(run) == [], "the primary has swept what both had put there"
    # What it cannot sweep, because it dies too, the next run does.
    leftover = "2/pytree/ocdbt.process_1/d/" + 32 * "a"
    place = parse_address(run)
    for name in (leftover, "9/pytree/_METADATA"):
        Store(place).put((place / name).key, b"a part")
    assert save(run, [3]) == [[], []]
    assert {name.partition("/")[0] for name in list_objects(run)} == {"3"}
    assert_whole(run, 3)


def test_a_commit_whose_acknowledgements_are_lost_is_durable_in_all_processes(
    proxy: Proxy, store: Server, run: str
) -> None:
    proxy.fail("lost", is_marker)
    assert save(through(proxy, store, run), [1], retry_seconds=1.0) == [[], []]
    assert {outcome for method, path, outcome in proxy.seen if is_marker(method, path)} == {"lost"}
    assert list_steps(run) == [1]
    assert_whole(run, 1)


# ------------------------------------------------------------------------------------------------- without trainers


class Writers:
    """What the writers of two processes do for a step of one structure, called one after another.

    Args:
        address: Of the steps.
        arrays: Both processes hold all of each.
    """

    def __init__(self, address: str, arrays: dict[str, np.ndarray]) -> None:
        self.root, self.target = address, below(address, "5")
        self._arrays = arrays
        leaves = [Leaf((name,), array.shape, "float32", shard_shape=array.shape) for name, array in arrays.items()]
        shares = share_out(leaves, [[range(2)]] * len(leaves), 2)
        self.plans = [shares.plan(process) for process in range(2)]
        documents = {"model": None, "places": shares.places, "processes": 2}
        self._step = FORMATS["orbax_merged"].prepare(self.plans[0], documents)
        self._shares = [
            FORMATS["orbax_share"].prepare(plan, {"process": process, "commits": process == 0})
            for process, plan in enumerate(self.plans)
        ]
        self._notes: dict[int, list[dict[str, Any]]] = {}  # by how often the step was saved

    def _make_job(self, repeat: int, form: str) -> Job:
        key, about = f"offstep/0123abcd/1/5/{repeat}", {"step": 5, "metrics": {}}
        return Job(1, 5, form, self.target, self.root, self.root, 1, 1, "tag", manifest=about, key=key)

    def share(self, repeat: int, attached: bytes | None = None) -> None:
        """Puts the shares there; process 1 has something attached to the step."""
        for process, plan in enumerate(self.plans):
            with ExitStack() as maps:
                slot = maps.enter_context(mmap.mmap(-1, plan.slot_bytes))
                files = {}
                if process and attached is not None:
                    files[ATTACHED] = maps.enter_context(mmap.mmap(-1, len(attached)))
                    files[ATTACHED][:] = attached
                for layout in plan.leaves:
                    chunks = list(cut_into_chunks(self._arrays[layout.leaf.name] + repeat, layout.chunk_shape))
                    for number, (offset, size) in zip(layout.numbers, layout.chunk_ranges(), strict=True):
                        slot[offset : offset + size] = chunks[number] + struct.pack("<I", crc32c(chunks[number]))
                share = FORMATS["orbax_share"].write(
                    self._make_job(repeat, "orbax_share"), self._shares[process], slot, files
                )
            assert isinstance(share, Share)
            self._notes.setdefault(repeat, []).append(share.note)

    def merge(self, repeat: int) -> None:
        with mmap.mmap(-1, mmap.PAGESIZE) as nothing, mmap.mmap(-1, len(json.dumps(self._notes[repeat]))) as reports:
            reports[:] = json.dumps(self._notes[repeat]).encode()
            FORMATS["orbax_merged"].write(
                self._make_job(repeat, "orbax_merged"), self._step, nothing, {orbax_merged.REPORTS_NAME: reports}
            )

    def discard(self, repeat: int, process: int) -> None:
        with mmap.mmap(-1, mmap.PAGESIZE) as nothing:
            job = self._make_job(repeat, "orbax_discard")
            FORMATS["orbax_discard"].write(job, self._shares[process], nothing, {})

    def list_pieces(self) -> list[tuple[int, int]]:
        """Returns process and repeat of each data object of a share."""
        found = (re.search(r"ocdbt.process_(\d)/d/.{16}(.{8})", name) for name in list_objects(self.root))
        return [(int(match[1]), int(match[2], 16)) for match in found if match is not None]


ATTACHED = "offstep-extra.process_1"
SMALL = {"a": np.zeros((64, 64), np.float32), "b": np.ones((64, 64), np.float32)}


@gs_only
def test_shares_of_several_objects_come_back(run: str) -> None:
    arrays = {f"leaf_{n}": np.arange(1300 * 2600, dtype=np.float32).reshape(1300, 2600) + n for n in range(4)}
    writers = Writers(run, arrays)
    writers.share(1)
    assert offstep.latest(run) is None
    writers.merge(1)
    assert writers.list_pieces() == [(0, 1), (0, 1), (1, 1), (1, 1)]
    for name, array in arrays.items():
        np.testing.assert_array_equal(offstep.read(run, name), array + 1)


@gs_only
def test_a_step_that_lacks_a_part_is_not_committed(run: str) -> None:
    writers = Writers(run, SMALL)
    writers.share(1)
    name = next(name for name in list_objects(run) if "process_1" in name)
    Store(parse_address(run)).delete((parse_address(run) / name).key)  # as another run's sweep would
    with pytest.raises(FileNotFoundError, match="1 of 2 data objects that were put there are gone"):
        writers.merge(1)
    assert list_steps(run) == []


@gs_only
def test_a_step_that_is_saved_again_is_replaced_and_spares_what_is_on_its_way(run: str) -> None:
    writers = Writers(run, SMALL)
    for repeat in (1, 2, 3):
        writers.share(repeat)
    writers.merge(1)
    assert len(writers.list_pieces()) == 6
    writers.merge(2)
    assert writers.list_pieces() == [(0, 2), (0, 3), (1, 2), (1, 3)]
    np.testing.assert_array_equal(offstep.read(run, "a"), SMALL["a"] + 2)
    writers.merge(2)  # as a writer would that takes the place of a dead one
    writers.discard(3, process=1)
    assert writers.list_pieces() == [(0, 2), (0, 3), (1, 2)]
    writers.discard(3, process=0)
    assert writers.list_pieces() == [(0, 2), (1, 2)]
    np.testing.assert_array_equal(offstep.read(run, "b"), SMALL["b"] + 2)


@gs_only
def test_what_a_process_attaches_has_its_name_from_the_commit_on(run: str) -> None:
    writers = Writers(run, SMALL)
    for repeat, content in ((1, b"one"), (2, b"two"), (3, b"three")):
        writers.share(repeat, content)
    assert not any(name.endswith(ATTACHED) for name in list_objects(run))
    step = open_place(writers.target)
    for repeat, content in ((1, b"one"), (2, b"two")):
        writers.merge(repeat)
        assert (step / ATTACHED).read_bytes() == content, "not that of a save which is on its way"
        assert offstep.verify(writers.target).ok
    writers.discard(3, process=1)
    assert writers.list_pieces() == [(0, 2), (0, 3), (1, 2)]


@gs_only
def test_what_is_attached_is_compared_before_the_commit(run: str) -> None:
    writers = Writers(run, SMALL)
    writers.share(1, b"as it was")
    piece = [name for name in list_objects(run) if "process_1" in name][-1]
    Store(parse_address(run)).put((parse_address(run) / piece).key, b"damaged")
    with pytest.raises(OSError, match="it is gone, or not what was put there"):
        writers.merge(1)
    assert list_steps(run) == []
    writers.discard(1, process=0)
    assert list_objects(run) == []


@gs_only
def test_dead_runs_are_swept_where_nothing_was_committed_and_live_ones_are_spared(run: str) -> None:
    writers = Writers(run, SMALL)
    writers.share(1)
    sweep_store(parse_address(run), partial(orbax_share_objects.is_of_run, key="offstep/0123abcd/2/7/1"))
    assert len(writers.list_pieces()) == 2, "another engine of the same run"
    sweep_store(parse_address(run), partial(orbax_share_objects.is_of_run, key="offstep/89abcdef/1/7/1"))
    assert list_objects(run) == []


# ---------------------------------------------------------------------------------------------------------- campaign


@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_four_processes_save_steps_that_one_two_and_four_restore(run: str) -> None:
    told = joint.run("joint_trees.py", 4, run, do="save", steps=[1, 2, 3], arguments={"max_to_keep": 2})
    assert [report["failures"] for report in told] == [[]] * 4
    assert list_steps(run) == [2, 3]
    assert offstep.verify(run).ok
    for count in (1, 2, 4):
        told = joint.run("joint_trees.py", count, run, do="restore", steps=[3], newest=True)
        assert told == [{"step": 3, "wrong": []}] * count


MESSAGES = [
    {"call": call, "nth": nth, "after": after}
    for call, most in (("put", 2), ("get", 1))
    for nth in range(1, most + 1)
    for after in (False, True)
]


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: "-".join(map(str, message.values())))
def test_killed_at_every_message(message: dict[str, Any], process: int, run: str) -> None:
    assert save(run, [1]) == [[], []]
    told = suffer(run, message | {"does": "SIGKILL"}, process=process)
    is_there = 2 in list_steps(run)
    for number, trainer in enumerate(told):
        if number != process and trainer.status == 0:  # else JAX has ended it, because process 0 is gone
            failures = trainer.report["failures"]
            is_unsure = failures and "it may still appear there" in failures[0]
            assert is_unsure or bool(failures) != is_there, trainer.errors
    assert_whole(run, 1)
    if is_there:
        assert_whole(run, 2)
    assert save(run, [3]) == [[], []]
    assert_whole(run, 3)
    assert {name.partition("/")[0] for name in list_objects(run)} == set("123" if is_there else "13")


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize("times", [1, float("inf")], ids=["once", "always"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", [*STATUSES, "reset", "lost", "black_hole", "slow", "gone"])
def test_every_fault_in_every_phase(proxy: Proxy, store: Server, run: str, kind: str, phase: str, times: float) -> None:
    assert save(run, [1]) == [[], []]
    proxy.fail(kind, PHASES[phase], times)
    failures = save(through(proxy, store, run), [2], retry_seconds=1.0, commit_seconds=20.0)
    proxy.heal()
    assert bool(failures[0]) == bool(failures[1]), "all are told the same"
    if not failures[0]:
        assert list_steps(run) == [1, 2]
        assert_whole(run, 2)
    else:
        assert list_steps(run) == [1] or "it may still appear there" in failures[0][0], failures
    assert_whole(run, 1)
    assert save(run, [3]) == [[], []]
    assert_whole(run, 3)
