"""What does each part of a save cost by itself? (pytest-benchmark: `pytest benchmarks/`)

    pip install 'offstep[benchmarks]' && pytest benchmarks/

Every figure is one part of the path from the training thread to the disk, on 600 MB in 80 arrays, 15 MB in 1,800 and
10,000 small ones. For what a save costs a training, see `bench_stall.py`.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offstep import _native, commit
from offstep.arrays import describe_leaf
from offstep.buffers import Slot
from offstep.copy_table import copy_table
from offstep.formats import orbax_directory
from offstep.formats.base_file import BaseFile
from offstep.frequency import Frequency
from offstep.plans import make_plan
from offstep.records import Job, Leaf, Plan
from offstep.snapshot import Snapshotter
from offstep.wire import Channel

Benchmark = Any  # pytest-benchmark carries no types
SHAPES = {"A: 600 MB in 80": (80, 1_875_000), "B: 15 MB in 1,800": (1_800, 2_083), "10,000 small": (10_000, 32)}
IO_THREADS = 2


@dataclass
class State:
    """One state, its plan, and a warm slot."""

    arrays: list[jax.Array]
    plan: Plan
    slot: Slot


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def state(request: pytest.FixtureRequest) -> Iterator[State]:
    count, size = request.param
    arrays = [jnp.full(size, number, jnp.float32) for number in range(count)]
    plan = make_plan(describe_leaf(("layers", f"{number:05}", "kernel"), array) for number, array in enumerate(arrays))
    slot = Slot(plan.slot_bytes, shared=True)
    slot.prefault(2)
    yield State(arrays, plan, slot)
    slot.close()


# ------------------------------------------------------------------------------------------- on the training thread


def test_matches(benchmark: Benchmark, state: State) -> None:
    assert benchmark(Snapshotter(state.plan, state.arrays).matches, state.arrays)


@pytest.mark.parametrize("threads", [1, 2])
def test_take(benchmark: Benchmark, state: State, threads: int) -> None:
    snapshotter = Snapshotter(state.plan, state.arrays, mode="host", threads=threads)
    benchmark(snapshotter.take, state.arrays, state.slot)


def test_take_through_transfers(benchmark: Benchmark, state: State) -> None:
    snapshotter = Snapshotter(state.plan, state.arrays, mode="transfer")
    benchmark.pedantic(snapshotter.take, (state.arrays, state.slot), rounds=5, warmup_rounds=1)


def test_bound_one_copy_of_warm_memory(benchmark: Benchmark, state: State) -> None:
    source, target = (np.ones(state.plan.state_bytes, np.uint8) for _ in range(2))
    benchmark(np.copyto, target, source)


def test_submit(benchmark: Benchmark) -> None:
    """One message through the pipe, taken out at the other end."""
    job = Job(1, 1, "orbax_directory", "/a/1", "/a", "/a", 1, 1, "tag", manifest={"epoch": 1, "metrics": {"loss": 0.5}})
    ours, theirs = map(Channel, socket.socketpair())

    def send() -> None:
        ours.send({"do": "save", "job": asdict(job)})
        assert theirs.receive(1.0)

    benchmark(send)
    ours.close()
    theirs.close()


def test_decide_within_a_budget(benchmark: Benchmark) -> None:
    frequency = Frequency(0.01)
    benchmark(frequency.end_batch, is_writing=False)


# ---------------------------------------------------------------------------------------- once for each structure


def test_make_plan(benchmark: Benchmark, state: State) -> None:
    leaves = [layout.leaf for layout in state.plan.leaves]
    benchmark.pedantic(make_plan, (leaves,), rounds=5)


def test_copy_table(benchmark: Benchmark, state: State) -> None:
    benchmark.pedantic(copy_table, (state.plan,), rounds=5)


def test_plan_to_json_and_back(benchmark: Benchmark, state: State) -> None:
    benchmark.pedantic(lambda: Plan.from_json(json.loads(json.dumps(state.plan.to_json()))), rounds=5)


def test_prepare_directory(benchmark: Benchmark, state: State) -> None:
    benchmark.pedantic(orbax_directory.prepare, (state.plan, None), rounds=5)


# -------------------------------------------------------------------------------------------- in the writer process


@pytest.fixture
def prepared(state: State) -> orbax_directory.PreparedDirectory:
    return orbax_directory.prepare(state.plan, None)


def make_files(prepared: orbax_directory.PreparedDirectory, slot: memoryview) -> Any:  # commit's parts by name
    return orbax_directory.data_files(prepared, slot, step=1, target="/a/1", now_ns=time.time_ns())


def test_lay_out_files(benchmark: Benchmark, state: State, prepared: orbax_directory.PreparedDirectory) -> None:
    with memoryview(state.slot.buffer) as view:
        benchmark(make_files, prepared, view)


def test_write_and_commit(
    benchmark: Benchmark, state: State, prepared: orbax_directory.PreparedDirectory, tmp_path: Path
) -> None:
    """Everything in the directory made durable, files and names, over an older checkpoint of the same step."""
    with memoryview(state.slot.buffer) as view:

        def write() -> None:
            with commit.StagedDirectory(tmp_path / "1") as staged:
                staged.write(make_files(prepared, view), io_threads=IO_THREADS)
                staged.commit()

        benchmark.pedantic(write, rounds=5, warmup_rounds=1)


def test_find_what_did_not_change(benchmark: Benchmark) -> None:
    leaves = [Leaf((f"leaf{number}",), (32,), "float32", is_frozen=True) for number in range(10_000)]
    plan = make_plan(leaves)
    base = BaseFile(plan)
    slot = memoryview(bytearray(plan.slot_bytes))
    base.remember(base.split(slot), None)
    assert benchmark(base.split, slot).is_linked


@pytest.mark.parametrize("size", [64, 4096, 64 << 20], ids=lambda size: f"{size} bytes")
def test_crc32c(benchmark: Benchmark, size: int) -> None:
    data = np.arange(size, dtype=np.uint8)
    benchmark(_native.crc32c, data, 0)


def test_wake_a_thread(benchmark: Benchmark) -> None:
    """The bound of every hand-over between threads: there and back."""
    asked, answered = threading.Semaphore(0), threading.Semaphore(0)
    is_over = threading.Event()

    def answer() -> None:
        while asked.acquire() and not is_over.is_set():
            answered.release()

    thread = threading.Thread(target=answer)
    thread.start()

    def ask() -> None:
        asked.release()
        answered.acquire()

    benchmark(ask)
    is_over.set()
    asked.release()
    thread.join()
