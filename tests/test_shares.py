"""Who writes what, where several processes hold the same."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from offstep.plans import find_shards
from offstep.records import Leaf
from offstep.shares import Shares, share_out

SHAPES = [(1 << 22,), (3, 1_000_003), (999_983,), (7, 11, 65_537), (2, 2, 2, 1 << 18), (1, 1 << 21), (1 << 20, 3)]


def replicated(*shapes: tuple[int, ...], dtype: str = "float32") -> list[Leaf]:
    return [Leaf((f"leaf_{number}",), shape, dtype, shard_shape=shape) for number, shape in enumerate(shapes)]


def load(shares: Shares, process: int) -> int:
    return sum(layout.chunk_count * layout.chunk_bytes for layout in shares.plan(process).leaves)


@pytest.mark.parametrize("processes", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_of_n_replicas_writes_about_an_nth(shape: tuple[int, ...], processes: int) -> None:
    shares = share_out(replicated(shape), [[range(processes)]], processes)
    loads = [load(shares, process) for process in range(processes)]
    whole = math.prod(shape) * 4
    assert whole <= sum(loads) < 1.05 * whole
    assert max(loads) < 1.35 * whole / processes


def test_many_small_leaves_are_shared_out_too() -> None:
    leaves = replicated(*((random.Random(number).randrange(1, 500),) for number in range(1000)))
    shares = share_out(leaves, [[range(4)]] * len(leaves), 4)
    loads = [load(shares, process) for process in range(4)]
    assert max(loads) - min(loads) < 0.01 * sum(loads)


def test_a_chunk_goes_to_a_process_that_holds_it_and_each_place_is_used_once() -> None:
    leaves = [
        *replicated((64, 4096), (10,), ()),
        Leaf(("spread",), (64, 4096), "float32", shard_shape=(32, 2048)),
        Leaf(("count",), (), "int32"),
    ]
    held = [[range(4)], [range(4)], [range(4)], [(0, 1), (2, 3), (0, 2), (1, 3)], [range(4)]]
    shares = share_out(leaves, held, 4)
    for layout, places, of_leaf in zip(shares.layouts, shares.places, held, strict=True):
        for shard, (process, _) in zip(find_shards(layout), places, strict=True):
            assert process in of_leaf[shard]
    for process in range(4):
        plan = shares.plan(process)
        ranges = sorted(piece for layout in plan.leaves for piece in layout.chunk_ranges())
        assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(ranges))
        assert ranges[-1][0] + ranges[-1][1] <= plan.slot_bytes
        for number, layout in enumerate(plan.leaves[:-1]):
            offsets = [offset for offset, _ in layout.chunk_ranges()]
            assert [(process, offset) for offset in offsets] == [
                place for place in shares.places[number] if place[0] == process
            ]
        assert plan.leaves[-1].chunks == (0,)  # the step is read from a slot, in every process


def test_processes_with_other_structures_are_told_apart() -> None:
    shares = [share_out(replicated(shape), [[range(2)]], 2) for shape in ((5, 7), (7, 5))]
    assert shares[0].digest != shares[1].digest
    assert shares[0].digest == share_out(replicated((5, 7)), [[range(2)]], 2).digest
