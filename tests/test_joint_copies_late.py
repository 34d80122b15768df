"""Copies that several processes make together into a store, threads in their place: retention, and what is late."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_proxy import Proxy
from messages import Messages
from object_stores import Server, gs_only, list_objects, proxy, run, store
from test_joint_copies import Disks
from test_store_faults import is_put

import offstep
from offstep import catalog
from offstep.coordination import Group
from offstep.joint_copies import JointCopies
from offstep.joint_jobs import JointJobs
from offstep.joint_save import Upload
from offstep.records import NO_SLOT
from offstep.stores.path import open_place
from offstep.writer import Writer

__all__ = ["proxy", "run", "store"]  # fixtures


class Trainer:
    """What one process has that copies together with others."""

    def __init__(self, disks: Disks, group: Group, commit_seconds: float) -> None:
        self.disks, self.process = disks, group.index
        self.outcomes: queue.Queue[dict[str, Any]] = queue.Queue()
        self.writer = Writer(in_process=True)
        changed = threading.Condition()
        about = {"process": self.process, "commits": self.process == 0}
        share_plan = self.writer.add_plan(disks.share_plan(self.process), "orbax_share", about)
        merged_plan = self.writer.add_plan(disks.share_plan(0), "orbax_merged", disks.documents)
        self.jobs = JointJobs(self.writer, changed)
        plans = {"share_plan": share_plan, "merged_plan": merged_plan}
        self.copies = JointCopies(
            group, self.writer, self.jobs, changed, digest="same", **plans, commit_seconds=commit_seconds
        )

    def add(self, **changes: Any) -> None:
        number = self.writer.next_job_number()
        source = str(self.disks.sources[self.process])
        job = replace(self.disks.make_job("upload", source=source), number=number, slot=NO_SLOT, **changes)
        self.copies.add("offstep/0123abcd/1/5/1", Upload(job, self.outcomes.put))

    def close(self) -> None:
        self.jobs.close()
        self.copies.end()
        self.writer.close()


@contextmanager
def start(disks: Disks, commit_seconds: float = 60.0) -> Iterator[list[Trainer]]:
    client = Messages()
    trainers = [Trainer(disks, Group(process, 2, client), commit_seconds) for process in range(2)]
    try:
        yield trainers
    finally:
        for trainer in trainers:
            trainer.copies.close()
        for trainer in trainers:
            trainer.close()


@gs_only
def test_older_steps_go_from_the_store_when_the_copy_is_committed_and_nobody_looks_before(
    run: str, tmp_path: Path
) -> None:
    """Each process ran the retention with its share: a false warning, or the old step went before the new one was."""
    disks = Disks(tmp_path, run, scale=64, has_nan=False)
    with offstep.Checkpointer(run) as checkpointer:
        checkpointer.save(3, {"w": np.zeros(3)})
    with start(disks) as trainers:
        for trainer in trainers:
            trainer.add(keep=1)
        outcomes = [trainer.outcomes.get(timeout=60) for trainer in trainers]
    assert [outcome.get("error") for outcome in outcomes] == [None, None]
    assert [outcome.get("remarks") for outcome in outcomes] == [[], []]
    assert [len(outcome["retired"]) for outcome in outcomes] == [1, 0]
    assert catalog.list_steps(open_place(run)) == [5]


@gs_only
def test_what_comes_into_the_store_after_the_copy_has_failed_is_deleted(
    proxy: Proxy, store: Server, run: str, tmp_path: Path
) -> None:
    """At the end of a training the writer was told nothing any more: the pieces stayed there."""
    may_pass = threading.Event()
    disks = Disks(tmp_path, run, scale=64)
    proxy.fail("503", lambda method, path: is_put(method, path) and not may_pass.wait(60))
    with start(disks, commit_seconds=0.5) as trainers:
        for trainer in trainers:
            trainer.add(retry_seconds=60.0)
        outcomes = [trainer.outcomes.get(timeout=60) for trainer in trainers]
        for trainer in trainers:
            trainer.copies.close()
        may_pass.set()
    assert ["its share was not written within 0.5 s" in outcome["error"] for outcome in outcomes] == [True, True]
    puts = [outcome for method, path, outcome in proxy.seen if is_put(method, path)]
    assert puts.count("passed") >= 2
    assert list_objects(run) == []


@gs_only
def test_a_copy_that_is_too_late_is_given_up(run: str, tmp_path: Path) -> None:
    disks = Disks(tmp_path, run, scale=64)
    with pytest.raises(TimeoutError, match="has been given up"):
        disks.copy(1, until=time.monotonic())
    assert list_objects(run) == []


@gs_only
def test_a_store_that_refuses_a_share_is_told_of_as_such(proxy: Proxy, store: Server, run: str, tmp_path: Path) -> None:
    """The traceback held parts of the map of the data file, and closing that was the error."""
    disks = Disks(tmp_path, run, scale=64)
    proxy.fail("403", is_put)
    with pytest.raises(PermissionError, match="cannot be written"):
        disks.copy(0)
