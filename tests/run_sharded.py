"""Saves arrays sharded over eight virtual devices and restores them differently; prints as JSON what held."""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from offstep.checkpointer import Checkpointer

devices = jax.devices()
assert len(devices) == 8
line = Mesh(np.array(devices), ("all",))
square = Mesh(np.array(devices).reshape(2, 4), ("data", "model"))
shuffled = Mesh(np.array(devices)[[3, 1, 7, 5, 0, 2, 6, 4]].reshape(4, 2), ("x", "y"))

SHARDINGS = {
    "one device": SingleDeviceSharding(devices[5]),
    "replicated": NamedSharding(line, P()),
    "axis 0": NamedSharding(line, P("all")),
    "axis 1": NamedSharding(line, P(None, "all")),
    "both axes": NamedSharding(square, P("data", "model")),
    "both axes swapped": NamedSharding(square, P("model", "data")),
    "two names on one axis": NamedSharding(square, P(("model", "data"))),
    "partly replicated": NamedSharding(square, P("model")),
    "partly replicated, last axis": NamedSharding(square, P(None, None, "data")),
    "shuffled devices": NamedSharding(shuffled, P("y", "x")),
}
VALUES = np.random.default_rng(0).standard_normal((16, 24, 6)).astype(np.float32)
tree = {name: jax.device_put(VALUES, sharding) for name, sharding in SHARDINGS.items()}
tree["bfloat16"] = jax.device_put(VALUES.astype(jnp.bfloat16), SHARDINGS["both axes"])
tree["int4"] = jax.device_put((VALUES > 0).astype(jnp.int4), SHARDINGS["both axes"])
tree["keys"] = jax.device_put(jax.random.split(jax.random.key(0), 16), NamedSharding(line, P("all")))
tree["large"] = jax.device_put(np.arange(8 * 4_400_006, dtype=np.int32).reshape(8, -1), SHARDINGS["both axes swapped"])


def same(left: Any, right: Any) -> bool:
    if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
        left, right = jax.random.key_data(left), jax.random.key_data(right)
    return left.dtype == right.dtype and np.array_equal(np.asarray(left), np.asarray(right))


report: dict[str, Any] = {}
for step, mode in enumerate(("host", "device_copy")):
    with Checkpointer(sys.argv[1], snapshot_mode=mode) as checkpointer:
        checkpointer.save(step, tree)
        checkpointer.wait()
        restored = checkpointer.restore(step)
        for name, array in tree.items():
            report[f"{mode}: {name}: values"] = same(restored[name], array)
            report[f"{mode}: {name}: sharding"] = restored[name].sharding == array.sharding
        plain = {name: array for name, array in tree.items() if name not in ("keys", "int4", "large")}
        for wanted_name, wanted in SHARDINGS.items():
            like = {
                name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=wanted) if name in plain else array
                for name, array in tree.items()
            }
            if step == 0 or wanted_name == "axis 1":
                again = checkpointer.restore(step, like)
                report[f"{mode}: restored as {wanted_name}"] = all(
                    same(again[name], array) and again[name].sharding == wanted for name, array in plain.items()
                )
        # Another sharding of the same shapes is another structure.
        moved = {"w": jax.device_put(VALUES, SHARDINGS["one device"])}
        checkpointer.save(10 + step, moved)
        moved = {"w": jax.device_put(VALUES, SHARDINGS["both axes"])}
        checkpointer.save(20 + step, moved)
        checkpointer.wait()
        report[f"{mode}: sharded later"] = same(checkpointer.restore(20 + step)["w"], VALUES)
        report[f"{mode}: written once"] = checkpointer.stats[0].state_bytes == sum(
            jax.random.key_data(array).nbytes if name == "keys" else array.nbytes for name, array in tree.items()
        )

# A replicated leaf is stored once, not once for each of its eight replicas.
with Checkpointer(sys.argv[1] + "/bytes") as checkpointer:
    big = np.zeros((1000, 1000), np.float32)
    checkpointer.save(1, {"w": jax.device_put(big, NamedSharding(line, P()))})
    checkpointer.wait()
    stored = sum(path.stat().st_size for path in checkpointer.directory.joinpath("1").rglob("*") if path.is_file())
report["bytes"] = round(stored / big.nbytes, 1)
report["expected bytes"] = 1.0
print(json.dumps(report))
