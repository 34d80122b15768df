"""One of several training processes: saves trees of arrays that span all of them, and tells what it saw as JSON.

Arguments: process, number of processes, port of the coordinator, directory, options as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from offstep import processes, writer_process
from offstep.coordination import Group, find_group

VALUES = np.random.default_rng(0).standard_normal((16, 24, 6)).astype(np.float32)


def connect(process: int, count: int, port: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, process, heartbeat_timeout_seconds=1000)


def spread(values: Any, sharding: Any) -> jax.Array:
    host = np.asarray(values)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def make_tree(step: int) -> dict[str, Any]:
    devices = np.array(jax.devices())
    line = Mesh(devices, ("all",))
    square = Mesh(devices.reshape(2, -1), ("data", "model"))
    shardings = {
        "replicated": NamedSharding(line, P()),
        "axis_0": NamedSharding(line, P("all")),
        "axis_1": NamedSharding(line, P(None, "all")),
        "both_axes": NamedSharding(square, P("data", "model")),
        "swapped": NamedSharding(square, P("model", "data")),
        "partly_replicated": NamedSharding(square, P("model")),
        "replicated_over_model": NamedSharding(square, P(None, "data")),
    }
    tree: dict[str, Any] = {name: spread(VALUES + step, sharding) for name, sharding in shardings.items()}
    tree["bfloat16"] = spread((VALUES + step).astype(jnp.bfloat16), shardings["both_axes"])
    tree["odd"] = spread(np.arange(3 * 70_001, dtype=np.float32).reshape(3, -1) + step, shardings["replicated"])
    tree["small"] = spread(np.arange(5, dtype=np.int8), shardings["replicated"])
    tree["empty"] = spread(np.zeros((0, 3), np.float32), shardings["replicated"])
    tree["count"] = spread(np.int32(step), shardings["replicated"])
    tree["host"] = np.arange(4) + step
    tree["number"] = 2.5 + step
    return tree


def gather_expected(tree: dict[str, Any], step: int) -> dict[str, np.ndarray]:
    """Returns what each leaf holds, without any communication."""
    values: dict[str, np.ndarray] = dict.fromkeys(tree, VALUES + step)
    values["bfloat16"] = (VALUES + step).astype(jnp.bfloat16)
    values["odd"] = np.arange(3 * 70_001, dtype=np.float32).reshape(3, -1) + step
    values["small"] = np.arange(5, dtype=np.int8)
    values["empty"] = np.zeros((0, 3), np.float32)
    values["count"] = np.asarray(np.int32(step))
    values["host"] = np.arange(4) + step
    values["number"] = np.asarray(2.5 + step)
    return values


def same_shards(array: Any, expected: np.ndarray) -> bool:
    if not isinstance(array, jax.Array):
        return np.asarray(array).tobytes() == expected.tobytes()
    return array.dtype == expected.dtype and all(
        np.asarray(shard.data).tobytes() == expected[shard.index].tobytes() for shard in array.addressable_shards
    )


def save(directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    from offstep import Checkpointer

    failures: list[str] = []
    with Checkpointer(directory, on_error="warn", **options.get("arguments", {})) as checkpointer:
        for step in options["steps"]:
            checkpointer.save(step, make_tree(step), {"loss": step / 2})
        started = time.monotonic()
        for pending in list(checkpointer._engine._reports.pending):
            try:
                pending.wait()
            except OSError as error:
                failures.append(str(error))
        waited = time.monotonic() - started
    stats = checkpointer.stats[-1]
    return {"failures": failures, "waited": waited, "written_bytes": stats.written_bytes, "bytes": stats.state_bytes}


class FailingGroup(Group):
    """A group that ends, or stops, this process at one of its messages.

    `fault` says at the how manieth `"call"` (`"put"` or `"get"`), `"after"` or before it, and what it `"does"`.
    """

    fault: ClassVar[dict[str, Any]] = {}
    counts: ClassVar[Counter[str]] = Counter()

    def put(self, key: str, text: str) -> None:
        self._suffer("put", after=False)
        super().put(key, text)
        self._suffer("put", after=True)

    def get(self, key: str, timeout_seconds: float) -> str | None:
        self._suffer("get", after=False)
        text = super().get(key, timeout_seconds)
        self._suffer("get", after=True)
        return text

    def _suffer(self, call: str, *, after: bool) -> None:
        fault = self.fault
        self.counts[call, after] += 1
        is_due = (fault["call"], fault.get("after", False)) == (call, after)
        if is_due and self.counts[call, after] == fault.get("nth", 1):
            # Not to the process: until another thread has got it, this one would go on.
            signal.pthread_kill(threading.get_ident(), getattr(signal, fault["does"]))


def arm(fault: dict[str, Any]) -> None:
    """Prepares this process for what it shall suffer."""
    if "call" in fault:
        FailingGroup.fault = fault
        processes.find_group = lambda: FailingGroup(*vars(find_group()).values())
    if "entry" in fault:
        writer_process.entry = fault["entry"]


def suffer(directory: Path, options: dict[str, Any]) -> None:
    """Saves one step, with a fault in some process, and ends without JAX's farewell, for which all would be needed."""
    fault = options.get("fault", {})
    arm(fault)
    jax.devices()  # for which JAX waits for all processes
    if fault.get("does") != "nothing":
        print(json.dumps(save(directory, options)), flush=True)
    sys.stdin.read()  # until all have reported
    os._exit(0)


def restore(directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    from offstep import restore as restore_tree

    [step] = options["steps"]
    report = restore_tree(make_tree(step + 100), directory if options.get("newest") else directory / str(step))
    expected = gather_expected(report.tree, step)
    return {
        "step": report.step,
        "wrong": [name for name, array in report.tree.items() if not same_shards(array, expected[name])],
    }


if __name__ == "__main__":
    index, count, port, folder, text = sys.argv[1:]
    if int(count) > 1:
        connect(int(index), int(count), port)
    settings = json.loads(text)
    if settings.get("is_on_hosts"):  # each process has a disk of its own
        folder = f"{folder}/host_{index}"
    root = folder if "://" in folder else Path(folder)
    print(json.dumps({"save": save, "suffer": suffer, "restore": restore}[settings["do"]](root, settings)))
