"""A trainer without Keras that overwrites one file over and over, until it is killed.

    python overwrite_file.py ORDERS TARGET

ORDERS is JSON: the plan, format and documents of a Keras model's file. Every leaf of generation n is filled with n.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from offstep.buffers import Slot
from offstep.plans import item_bytes
from offstep.records import Job, Plan
from offstep.rendering import read_arrays
from offstep.writer import Writer


def fill(plan: Plan, slot: Slot, generation: int) -> None:
    for array, layout in zip(read_arrays(plan, slot.buffer), plan.leaves, strict=True):
        count = array.size * item_bytes(layout.leaf.dtype)
        slot.buffer[layout.offset : layout.offset + count] = array.dtype.type(generation).tobytes() * array.size


def main() -> None:
    orders, target = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    plan = Plan.from_json(orders["plan"])
    writer = Writer()
    slot = Slot(plan.slot_bytes, shared=True)
    writer.start()
    writer.add_slot(slot)
    number = writer.add_plan(plan, orders["format"], orders["documents"])
    outcomes: list[dict[str, object]] = []
    for generation in itertools.count(1):
        fill(plan, slot, generation)
        job = Job(
            number=writer.next_job_number(),
            step=generation,
            format=orders["format"],
            target=str(target),
            base=str(target.parent),
            root=str(target.parent),
            slot=slot.number,
            plan=number,
            tag=writer.job_tag(generation),
        )
        writer.submit(job, outcomes.append)
        while len(outcomes) < generation:
            writer.collect(timeout_seconds=60.0)
        assert "error" not in outcomes[-1], outcomes[-1]
        print(generation, writer.pid, flush=True)


if __name__ == "__main__":
    main()
