"""The commits of one process of several, without the others."""

from __future__ import annotations

import queue
from dataclasses import replace
from pathlib import Path
from typing import Any

from messages import Messages
from test_joint_copies import Disks, fill_slot

from offstep import catalog
from offstep.buffers import Slot
from offstep.coordination import Group
from offstep.joint_commit import JointCommits
from offstep.writer import Writer


def test_a_step_whose_elders_cannot_be_deleted_is_durable_all_the_same(tmp_path: Path) -> None:
    """The process took it for failed, and withdrew its copy; its plans stayed with the writer."""
    disks = Disks(tmp_path / "disks", "gs://bucket/run", scale=64)
    base = tmp_path / "base"
    base.mkdir()
    writer = Writer(in_process=True)
    slot = Slot(disks.plans[0].slot_bytes, shared=False)
    fill_slot(slot.buffer, disks.plans[0], disks.arrays)
    writer.add_slot(slot)
    plan = writer.add_plan(disks.plans[0], "orbax_directory", None)
    share = writer.add_plan(disks.share_plan(0), "orbax_share", {"process": 0, "commits": True})
    merged = writer.add_plan(disks.share_plan(0), "orbax_merged", disks.documents)
    joint = JointCommits(
        Group(0, 1, Messages()),
        writer,
        digest="same",
        share_plan=share,
        merged_plan=merged,
        is_local=True,
        commit_seconds=60.0,
    )
    root = base / "process_0"
    job = disks.make_job("orbax_directory", target=root / "5", base=base, root=root)
    job = replace(job, number=writer.next_job_number(), slot=slot.number, plan=plan)
    outcomes: queue.Queue[dict[str, Any]] = queue.Queue()
    joint.submit(
        job,
        {},
        on_submitted=lambda: None,
        on_written=lambda: base.rename(tmp_path / "away") and None,  # so that nothing can be deleted in it
        on_outcome=outcomes.put,
    )
    joint.take_in(60.0, until=lambda: not outcomes.empty())
    joint.close()
    outcome = outcomes.get(timeout=60)
    assert "error" not in outcome, outcome["error"]
    assert "step 5 is durable, but older ones may not have been deleted" in outcome["remarks"][0]
    assert catalog.list_steps(tmp_path / "away" / "process_0") == [5]
    assert list(writer._handed.plans) == [plan]
    writer.drop_slot(slot)
    writer.close()
    slot.close()
