"""Processes that each have a disk of their own, from which steps are copied into a store: there they are one step.

pytest tests/test_joint_copies.py -m campaign      four processes, a slow store, and faults at each message of a copy
"""

from __future__ import annotations

import json
import mmap
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import fault_proxy
import joint
import numpy as np
import pytest
from fault_proxy import Proxy
from object_stores import Server, below, download, gs_only, list_objects, proxy, run, s3_only, store, through
from slots import cut_into_chunks
from test_store_faults import is_put

import offstep
from offstep import catalog, manifest
from offstep._native import crc32c
from offstep.formats import FORMATS, orbax_merged
from offstep.records import Job, Leaf, Plan, Share
from offstep.shares import keep_all, share_out
from offstep.stores.path import open_place

__all__ = ["proxy", "run", "store"]  # fixtures

ARGUMENTS = {"layout": "local", "upload_every": 2, "local_max_to_keep": 1}


def train(count: int, directory: Path, run: str, **options: Any) -> list[dict[str, Any]]:
    about = {"kind": "spread", "batches": 10, "filepath": below(run, "{step}"), "arguments": ARGUMENTS, "hosts": True}
    return joint.run("joint_keras.py", count, directory, do="train", **about | options)


def assert_copied(count: int, directory: Path, run: str, told: list[dict[str, Any]]) -> None:
    """Saved at 2, 4, ... 10 on each disk, copied at 4 if there was time, and at 8."""
    assert told == [{"durable": 5, "failed": 0, "uploaded": told[0]["uploaded"]}] * count
    copied = catalog.list_steps(open_place(run))
    assert copied == ([4, 8] if told[0]["uploaded"] == 2 else [8])
    for process in range(count):
        assert catalog.list_steps(directory / f"host_{process}" / f"process_{process}")[-1] == 10
    assert {name.partition("/")[0] for name in list_objects(run)} == set(map(str, copied))
    report = offstep.verify(run)
    assert report.ok, report.problems


@s3_only
@pytest.mark.timeout(300)
def test_steps_of_two_disks_are_one_in_the_store_that_stock_keras_loads_and_all_restore_when_a_disk_is_lost(
    run: str, tmp_path: Path
) -> None:
    told = train(2, tmp_path, run)
    assert_copied(2, tmp_path, run, told)
    copy = download(run, tmp_path / "root")
    written = manifest.read(copy / "8")
    assert written is not None
    assert (written.part, written.nonfinite, written.batch) == (None, 0, 8)
    assert len(list((copy / "8" / "pytree").glob("ocdbt.process_*/d/*"))) == 2
    assert joint.run("joint_keras.py", 1, tmp_path, do="load", steps=[8]) == [{"wrong": []}]
    options = {"kind": "spread", "filepath": below(run, "{step}"), "hosts": True, "loser": 1}
    said = joint.run("joint_keras.py", 2, tmp_path, do="lose", **options)
    assert [(report["steps"], report["wrong"]) for report in said] == [([10, 8], [])] * 2
    assert "step 10 in" in said[0]["said"][0]
    assert "all take 8" in said[0]["said"][0]
    assert said[1]["said"] == []


# ---------------------------------------------------------------------------------------------------------- campaign


@pytest.mark.campaign
@gs_only
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["data", "model", "spread"])
def test_four_disks(kind: str, run: str, tmp_path: Path) -> None:
    told = train(4, tmp_path, run, kind=kind)
    assert_copied(4, tmp_path, run, told)
    download(run, tmp_path / "root")
    assert joint.run("joint_keras.py", 1, tmp_path, do="load", steps=[8]) == [{"wrong": []}]
    options = {"kind": kind, "filepath": below(run, "{step}"), "hosts": True, "loser": 2}
    said = joint.run("joint_keras.py", 4, tmp_path, do="lose", **options)
    assert [(report["steps"], report["wrong"]) for report in said] == [([10, 8], [])] * 4


@pytest.mark.campaign
@gs_only
@pytest.mark.timeout(300)
def test_of_a_slow_store_all_leave_the_same_copies_out_and_what_is_copied_stays_on_the_disks(
    proxy: Proxy, store: Server, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fault_proxy, "SECONDS_PER_SLOW_BLOCK", 0.3)
    proxy.fail("slow", is_put)
    arguments = ARGUMENTS | {"upload_every": 1}
    told = train(2, tmp_path, through(proxy, store, run), batches=40, arguments=arguments)
    uploaded = told[0]["uploaded"]
    assert told == [{"durable": 20, "failed": 0, "uploaded": uploaded}] * 2
    copied = catalog.list_steps(open_place(run))
    assert (len(copied), copied[-1]) == (uploaded, 40)
    assert uploaded < 10
    assert offstep.verify(run).ok
    for process in range(2):  # beside the newest: what was copied, and of what waited what was not known to be left out
        assert len(catalog.list_steps(tmp_path / f"host_{process}" / f"process_{process}")) <= 4


# Of process 0: begins, decides on the save, on the copy's turn, on the copy. Of the others: report the save, the copy.
MESSAGES = [
    *({"process": 0, "call": "put", "nth": nth} for nth in (3, 4)),
    {"process": 0, "call": "get", "nth": 2},
    {"process": 1, "call": "put", "nth": 2},
    *({"process": 1, "call": "get", "nth": nth} for nth in (3, 4)),
]


@pytest.mark.campaign
@gs_only
@pytest.mark.timeout(600)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("does", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: "-".join(map(str, message.values())))
def test_a_process_that_fails_in_a_copy_leaves_the_step_on_all_disks_and_a_whole_one_or_none_in_the_store(
    message: dict[str, Any], does: str, after: bool, run: str, tmp_path: Path
) -> None:
    process = message["process"]
    arguments = {"layout": "local", "commit_seconds": 5.0, "on_error": "warn"}
    about = {"kind": "data", "batches": 2, "filepath": below(run, "{step}"), "arguments": arguments, "hosts": True}
    options: list[dict[str, Any]] = [{"do": "suffer"} | about for _ in range(2)]
    options[process] |= {"fault": message | {"does": does, "after": after}}
    trainers = joint.start("joint_keras.py", 2, tmp_path, options)
    try:
        trainers[1 - process].read()
    finally:
        for trainer in trainers:
            trainer.kill()
    other = trainers[1 - process].report
    copied = catalog.list_steps(open_place(run))
    if other:  # else JAX has ended it, because process 0 is gone
        assert (other["durable"], other["failed"]) == (1, 0)
        assert bool(other["said"]) != bool(other["uploaded"])
        assert not other["uploaded"] or copied == [2]
        if process == 1 and other["said"]:
            assert "step 2 is durable, but was not copied to" in other["said"][0]
            assert "process 1 of 2 has not reported its share within 5 s" in other["said"][0]
            assert copied == []
    for number in range(2):
        assert catalog.list_steps(tmp_path / f"host_{number}" / f"process_{number}") == [2]
    assert not copied or offstep.verify(run).ok
    told = train(2, tmp_path, run, kind="data", batches=4, arguments={"layout": "local", "upload_every": 2})
    assert [report["failed"] for report in told] == [0, 0]
    assert catalog.list_steps(open_place(run)) == [*copied, 4]
    assert {name.partition("/")[0] for name in list_objects(run)} == set(map(str, [*copied, 4]))


# ------------------------------------------------------------------------------------------------- without trainers


class Disks:
    """Two processes with disks of their own, one after another; both hold all of `both`, and half of `rows` each.

    Args:
        directory: Of the disks.
        address: Of the steps in the store.
        scale: How large the arrays are.
        has_nan: Whether there is one in them.
    """

    def __init__(self, directory: Path, address: str, scale: int, *, has_nan: bool = True) -> None:
        self.arrays = {
            "both": np.arange(scale * 64, dtype=np.float32).reshape(scale, 64),
            "count": np.asarray(np.int32(5)),
            "rows": np.arange(scale * 64, dtype=np.float32).reshape(scale, 64) / 2,
        }
        self.arrays["both"][0, 0] = np.nan if has_nan else 0  # on both disks, but once in the store
        self.root, self.target = address, below(address, "5")
        leaves = [
            Leaf((name,), array.shape, array.dtype.name, shard_shape=array.shape) for name, array in self.arrays.items()
        ]
        leaves[2] = replace(leaves[2], shard_shape=(scale // 2, 64))
        holders = [[range(2)], [range(2)], [[0], [1]]]
        self._shares = share_out(leaves, holders, 2)
        self.documents = {"model": None, "places": self._shares.places, "processes": 2}
        self._step = FORMATS["orbax_merged"].prepare(self._shares.plan(0), self.documents)
        self.sources = [directory / f"process_{process}" / "5" for process in range(2)]
        self.plans: list[Plan] = []
        for process, source in enumerate(self.sources):
            plan = keep_all(leaves, holders, process, cut=self._shares.layouts)
            job = self.make_job("orbax_directory", target=source, base=directory, root=source.parent)
            self.plans.append(plan)
            job = replace(job, manifest=job.manifest | {"part": (process, 2), "save": job.key})
            with mmap.mmap(-1, plan.slot_bytes) as slot:
                fill_slot(slot, plan, self.arrays)
                with mmap.mmap(-1, 8) as extra:
                    extra[:] = b"extra %02d" % process
                    attached = {"offstep-extra": extra, "offstep-extra.large": extra}
                    FORMATS["orbax_directory"].write(
                        job, FORMATS["orbax_directory"].prepare(plan, None), slot, attached
                    )

    def make_job(self, form: str, *, number: int = 1, until: float | None = None, **places: Any) -> Job:
        key, about = "offstep/copy/0123abcd/1/5/1", {"step": 5, "metrics": {}, "run": "0123abcd", "number": number}
        job = Job(1, 5, form, self.target, self.root, self.root, 1, 1, "tag", manifest=about, key=key, until=until)
        return replace(job, **{name: str(place) for name, place in places.items()})

    def share_plan(self, process: int) -> Plan:
        return self._shares.plan(process, has_all_counters=False)

    def copy(self, process: int, **changes: Any) -> Share:
        about = {"process": process, "commits": process == 0}
        prepared = FORMATS["orbax_share_copy"].prepare(self.share_plan(process), about)
        job = self.make_job("orbax_share_copy", **{"source": self.sources[process]} | changes)
        with mmap.mmap(-1, mmap.PAGESIZE) as nothing:
            share = FORMATS["orbax_share_copy"].write(job, prepared, nothing, {})
        assert isinstance(share, Share)
        return share

    def merge(self, notes: list[dict[str, Any]]) -> None:
        text = json.dumps(notes).encode()
        with mmap.mmap(-1, mmap.PAGESIZE) as nothing, mmap.mmap(-1, len(text)) as reports:
            reports[:] = text
            job = self.make_job("orbax_merged", source=self.sources[0])
            FORMATS["orbax_merged"].write(job, self._step, nothing, {orbax_merged.REPORTS_NAME: reports})


def fill_slot(slot: mmap.mmap, plan: Plan, arrays: dict[str, np.ndarray]) -> None:
    for layout in plan.leaves:
        chunks = list(cut_into_chunks(arrays[layout.leaf.name], layout.chunk_shape))
        for number, (offset, size) in zip(layout.numbers, layout.chunk_ranges(), strict=True):
            slot[offset : offset + size] = chunks[number] + struct.pack("<I", crc32c(chunks[number]))


@gs_only
def test_each_disk_gives_its_share_in_pieces_and_what_both_have_is_there_once(run: str, tmp_path: Path) -> None:
    disks = Disks(tmp_path, run, scale=100_000)
    shares = [disks.copy(process) for process in range(2)]
    assert offstep.latest(run) is None
    assert [len(share.note["pieces"]) > 1 for share in shares] == [True, True]
    whole = sum(array.nbytes for array in disks.arrays.values())
    assert sum(share.written_bytes for share in shares) < 1.01 * whole
    disks.merge([share.note for share in shares])
    for name, array in disks.arrays.items():
        np.testing.assert_array_equal(offstep.read(run, name), array)
    written = manifest.read(open_place(below(run, "5")))
    assert written is not None
    assert written.nonfinite == 1
    for process, name in enumerate(("offstep-extra", "offstep-extra.process_1")):
        for end in ("", ".large"):
            assert (open_place(below(run, "5")) / (name + end)).read_bytes() == b"extra %02d" % process


@gs_only
def test_what_was_saved_again_or_is_damaged_or_has_no_place_to_go_is_not_copied(run: str, tmp_path: Path) -> None:
    disks = Disks(tmp_path, run, scale=64)
    with pytest.raises(FileNotFoundError, match="has been saved again"):
        disks.copy(0, number=2)
    with pytest.raises(FileNotFoundError, match=r"no such bucket|not found|404"):
        disks.copy(0, target=disks.target.replace("gs://", "gs://not-"))
    index = disks.sources[1] / "pytree" / "manifest.ocdbt"
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(offstep.CheckpointDamaged):
        disks.copy(1)
    assert list_objects(run) == []
