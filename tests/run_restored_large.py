"""Restores a model of 200 MB; prints as JSON how much memory that took, and whether anything else was changed."""

import json
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

import offstep

directory = Path(sys.argv[1])
WIDTH, DEPTH = 1448, 8  # kernels of 8 MB


def make_model() -> Any:
    inputs = x = layers.Input((WIDTH,), name="inputs")
    for number in range(DEPTH):
        x = layers.Dense(WIDTH, name=f"dense_{number}")(x)
    model = keras.Model(inputs, x, name="large")
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def read_status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(field)]
    return int(line.split()[1]) * 1024


def measure_peak(restore: Any) -> int:
    before = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    restore()
    return read_status("VmHWM") - before


def values(model: Any) -> list[np.ndarray]:
    return [np.array(v.value) for v in (*model.variables, *model.optimizer.variables)]


model = make_model()
for number, variable in enumerate(model.optimizer.variables[2:]):
    variable.assign(np.full(variable.shape, number, np.float32))
expected = values(model)
callback = offstep.ModelCheckpoint(directory / "{step}", in_process=True)
callback.set_model(model)
callback.on_train_begin()
callback.on_epoch_begin(0)
callback.on_epoch_end(0, {})
callback.on_train_end()

keras.utils.clear_session()
other = make_model()

held = other.get_layer("dense_0").kernel.value
view = np.asarray(other.get_layer("dense_1").kernel.value)
other.get_layer("dense_2").kernel.assign(other.get_layer("dense_3").kernel)  # one array of JAX for two variables
copies = [np.array(held), view.copy()]
offstep.restore(other, directory)
held_is_kept = np.array_equal(held, copies[0]) and np.array_equal(view, copies[1])
first_is_equal = all(map(np.array_equal, values(other), expected))
del held, view
for variable in other.optimizer.variables[2:]:
    variable.assign(variable.value * 0)
peak = measure_peak(lambda: offstep.restore(other, directory))
report = {
    "held is kept": bool(held_is_kept),
    "equal": bool(first_is_equal),
    "equal again": all(map(np.array_equal, values(other), expected)),
    "state_bytes": sum(array.nbytes for array in expected),
    "peak_bytes": peak,
}
print(json.dumps(report))
