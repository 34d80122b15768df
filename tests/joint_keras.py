"""One of several training processes: trains a Keras model over all of them and saves, or restores what was saved.

Arguments as for `joint_trees`. What each variable was at each step goes into `expected/<process>.npz`, by its path and
where the part begins.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
from joint_trees import arm, connect
from spread_model import list_variables, make_model

Model = Any  # Keras carries no types


def distribute(kind: str) -> None:
    devices = keras.distribution.list_devices()
    if kind == "data":
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False))
    if kind == "model":
        mesh = keras.distribution.DeviceMesh((2, len(devices) // 2), ("batch", "model"), devices)
        distribute_model(mesh)
    if kind == "spread":  # no process has all of a leaf
        distribute_model(keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices))


def distribute_model(mesh: keras.distribution.DeviceMesh) -> None:
    layout = keras.distribution.LayoutMap(mesh)
    layout["wide/kernel"] = (None, "model")
    layout["wide/bias"] = ("model",)
    layout["narrow/kernel"] = ("model", None)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch", auto_shard_dataset=False)
    )


def find_data_group(kind: str) -> int:
    """Returns which part of each batch this process feeds; in a mesh of models several have to feed the same."""
    groups = {"model": 2, "spread": 1}.get(kind, jax.process_count())
    return jax.process_index() * groups // jax.process_count()


def list_shards(model: Model) -> dict[str, np.ndarray]:
    """Returns this process's parts of the variables, by path and start."""
    return {
        f"{variable.path}@{','.join(str(piece.start or 0) for piece in shard.index)}": np.asarray(shard.data)
        for variable in list_variables(model)
        for shard in variable.value.addressable_shards
    }


class Recorder(keras.callbacks.Callback):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.every, self.batches = steps, 0
        self.found: dict[str, np.ndarray] = {}

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches += 1
        if self.batches % self.every == 0:
            self.model.jax_state_sync()
            self.found |= {f"{self.batches}/{name}": value for name, value in list_shards(self.model).items()}


def train(directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    from offstep import ModelCheckpoint

    model = make_model()
    recorder = Recorder(2)
    template = options.get("filepath", directory / "root" / "{step}")
    ours = ModelCheckpoint(template, save_freq=2, **find_host(directory, options), **options.get("arguments", {}))
    rows = 8 * options["batches"]
    # Each process feeds its part of each batch.
    data = np.random.default_rng(find_data_group(options["kind"])).random((rows, 8), "float32")
    model.fit(data, data, batch_size=8, epochs=1, shuffle=False, verbose=0, callbacks=[ours, recorder])
    (directory / "expected").mkdir(exist_ok=True)
    np.savez(directory / "expected" / f"{jax.process_index()}.npz", **recorder.found)
    counts = {"durable": ours.counts.durable, "failed": ours.counts.failed}
    return counts if "hosts" not in options else counts | {"uploaded": ours.counts.uploaded}


def find_host(directory: Path, options: dict[str, Any]) -> dict[str, str]:
    """Returns which directory is on this process's own disk, where each has one."""
    return {"local": f"{directory}/host_{jax.process_index()}"} if "hosts" in options else {}


def count_in_training(directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Returns how often each collective ran on this process's devices in a training without saves, and in one with."""
    from offstep import ModelCheckpoint, keras_state

    model = make_model()
    data = np.zeros((8 * options["batches"], 8), "float32")
    model.fit(data[:8], data[:8], batch_size=8, verbose=0)
    jax.block_until_ready(keras_state.live_arrays(model))
    found = []
    for save_freq in (1 << 40, 2):
        ours = ModelCheckpoint(directory / "root" / "{step}", save_freq=save_freq)
        traced = directory / f"trace-{jax.process_index()}-{save_freq}"
        with jax.profiler.trace(traced):
            model.fit(data, data, batch_size=8, shuffle=False, verbose=0, callbacks=[ours])
            jax.block_until_ready(keras_state.live_arrays(model))
        assert ours.counts.durable == (0 if save_freq > 2 else options["batches"] // 2)
        found.append(count_collectives(traced))
    return {"counts": found}


def count_collectives(traced: Path) -> dict[str, int]:
    [file] = traced.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    names = (event.name for plane in planes for line in plane.lines for event in line.events)
    kinds = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective")
    return dict(Counter(kind for name in names for kind in kinds if name.startswith(kind)))


def restore(directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    from offstep import restore as restore_model

    model = make_model()
    wrong: list[str] = []
    for step in options["steps"]:
        restore_model(model, directory / "root" / str(step))
        wrong += find_wrong(model, directory, step)
    return {"wrong": wrong, "devices": len(model.trainable_variables[0].value.sharding.device_set)}


def suffer(directory: Path, options: dict[str, Any]) -> None:
    """Trains, with a fault in some process, and ends without JAX's farewell, for which all would be needed."""
    arm(options.get("fault", {}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = train(directory, options)
    report["said"] = [str(each.message) for each in caught if each.category is RuntimeWarning]
    print(json.dumps(report), flush=True)
    sys.stdin.read()  # until all have reported
    os._exit(0)


def lose(directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Restores the newest step; then a host loses its disk, and all restore again."""
    from offstep import restore as restore_model

    told: dict[str, Any] = {"steps": [], "wrong": [], "said": []}
    model, own = make_model(), find_host(directory, options)
    for loses in (False, True):
        if loses and jax.process_index() == options["loser"]:
            shutil.rmtree(own["local"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = restore_model(model, options["filepath"].replace("/{step}", ""), **own)
        told["said"] += [str(each.message) for each in caught if each.category is RuntimeWarning]
        told["steps"].append(report.step)
        told["wrong"] += find_wrong(model, directory, report.step)
    return told


def load(directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    sys.modules["offstep"] = None  # type: ignore[assignment]  # from here on it cannot be imported
    model = keras.saving.load_model(directory / "root")
    return {"wrong": find_wrong(model, directory, options["steps"][-1])}


def read_expected(directory: Path, step: int) -> dict[str, dict[tuple[int, ...], np.ndarray]]:
    """Returns the parts of each variable at a step, by where they begin, from all processes."""
    parts: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for path in sorted((directory / "expected").glob("*.npz")):
        with np.load(path) as arrays:
            for name in arrays.files:
                at, _, rest = name.partition("/")
                variable, _, start = rest.partition("@")
                if int(at) == step:
                    corner = tuple(int(piece) for piece in start.split(",") if piece)
                    parts.setdefault(variable, {})[corner] = arrays[name]
    return parts


def find_wrong(model: Model, directory: Path, step: int) -> list[str]:
    expected = read_expected(directory, step)
    wrong = []
    for variable in list_variables(model):
        shape = tuple(variable.shape)
        for shard in variable.value.addressable_shards:
            whole = np.zeros(shape, shard.data.dtype)
            for corner, part in expected[variable.path].items():
                whole[tuple(slice(at, at + size) for at, size in zip(corner, part.shape, strict=True))] = part
            if np.asarray(shard.data).tobytes() != whole[shard.index].tobytes():
                wrong.append(f"{step}: {variable.path}")
    return wrong


if __name__ == "__main__":
    index, count, port, folder, text = sys.argv[1:]
    settings = json.loads(text)
    if int(count) > 1:
        connect(int(index), int(count), port)
    distribute(settings.get("kind", ""))
    tasks = {"train": train, "count": count_in_training, "restore": restore, "load": load, "lose": lose}
    print(json.dumps((tasks | {"suffer": suffer})[settings["do"]](Path(folder), settings)))
