"""Saves and restores arrays of eight bytes an element; prints as JSON which came back."""

import json
import sys

import jax.numpy as jnp
import numpy as np

from offstep.checkpointer import Checkpointer

tree = {}
for name in ("float64", "int64", "uint64", "complex128"):
    size_bytes = 35 * np.dtype(name).itemsize
    bits = np.random.default_rng(0).integers(0, 256, size_bytes, np.uint8)
    tree[name] = jnp.asarray(bits.view(name).reshape(5, 7))
    assert tree[name].dtype == name

report = dict.fromkeys(tree, True)
for step, mode in enumerate(("host", "device_copy")):
    with Checkpointer(sys.argv[1], snapshot_mode=mode) as checkpointer:
        checkpointer.save(step, tree)
        checkpointer.wait()
        restored = checkpointer.restore(step)
    for name, array in tree.items():
        report[name] &= restored[name].dtype == name and restored[name].tobytes() == array.tobytes()
print(json.dumps(report))
