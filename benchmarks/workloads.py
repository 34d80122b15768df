"""Which models are trained while a benchmark saves them?

Every workload is a real Keras model (a chain of `Dense` layers, or of a few layers that each hold many small weights)
under Adam, so a third of the state is parameters and two thirds are Adam's slots. Only `build` imports Keras: the
process that starts the runs never does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras
    import numpy as np


@dataclass(frozen=True)
class Workload:
    """One model, and how often it is saved.

    Attributes:
        name: Short name for tables.
        question: What it stands for.
        layers: Number of `Dense` layers; each has a kernel and a bias.
        width: Units of every layer.
        batch: Samples per step; sets how long a step computes.
        save_freq: Batches from one save to the next.
        saves: Saves that are measured in one run.
        warmup_saves: Saves before the clock starts (compilation, first touch of buffers, lazy imports).
        frozen_layers: How many of the layers are not trainable (and then have no Adam slots).
        bundled: All layers live in one Keras layer: the same arrays, far fewer Python objects to build.
    """

    name: str
    question: str
    layers: int
    width: int
    batch: int
    save_freq: int
    saves: int
    warmup_saves: int = 2
    frozen_layers: int = 0
    bundled: bool = False

    @property
    def steps(self) -> int:
        """Steps of one run: one more than the last save, so that a save made before the *next* batch is inside."""
        return self.save_freq * (self.warmup_saves + self.saves) + 1

    @property
    def state_variables(self) -> int:
        """Arrays of state: parameters, Adam's two slots for each, iterations and learning rate."""
        return 2 * (self.layers + 2 * (self.layers - self.frozen_layers)) + 2

    @property
    def state_bytes(self) -> int:
        """Bytes of parameters and Adam's slots."""
        per_layer = 4 * (self.width * self.width + self.width)
        return per_layer * (self.layers + 2 * (self.layers - self.frozen_layers))


WORKLOADS = {
    "A": Workload("A", "600 MB of state in 80 variables", 13, 1960, batch=64, save_freq=5, saves=4),
    "B": Workload("B", "15 MB of state in 1,800 variables", 300, 64, batch=32, save_freq=100, saves=6),
    "C": Workload("C", "200 MB of state, short steps", 8, 1444, batch=16, save_freq=20, saves=6),
    "D": Workload("D", "100 MB of state, steps of 100 ms or more", 8, 1020, batch=256, save_freq=10, saves=6),
    "L": Workload("L", "LoRA: 99 % of 205 MB frozen", 300, 412, batch=16, save_freq=20, saves=6, frozen_layers=299),
}


def shrink(workload: Workload) -> Workload:
    """Returns the workload with as few saves as show that everything works."""
    return replace(workload, saves=2, warmup_saves=1)


def at_frequency(workload: Workload, save_freq: int, saved_steps: int = 20) -> Workload:
    """Returns the workload saved every `save_freq` steps, over at least `saved_steps` steps and three saves."""
    saves = max(3, saved_steps // save_freq)
    return replace(workload, name=f"{workload.name}, N={save_freq}", save_freq=save_freq, saves=saves)


def small_leaves(leaves: int, width: int = 32) -> Workload:
    """Returns a workload of about `leaves` equally small arrays of state."""
    layers = max(1, round((leaves - 2) / 6))
    freq = max(40, min(1_000, 200_000 // leaves))
    return Workload(f"{leaves} leaves", f"{leaves:,} small arrays", layers, width, 8, freq, saves=5, bundled=True)


def build(workload: Workload, seed: int) -> tuple[keras.Model, np.ndarray]:
    """Returns a compiled model and the samples of one run; the targets are the samples themselves."""
    import keras
    import numpy as np

    keras.utils.set_random_seed(seed)
    inputs = keras.Input((workload.width,))
    model = keras.Model(inputs, _chain(workload, inputs))
    model.compile("adam", "mse")
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal((workload.batch * workload.steps, workload.width), dtype=np.float32)
    return model, samples


def _chain(workload: Workload, x: keras.KerasTensor) -> keras.KerasTensor:
    import keras

    if workload.bundled:
        from bundle import DenseBundle

        return DenseBundle(workload.layers)(x)
    for i in range(workload.layers):
        dense = keras.layers.Dense(workload.width, activation="tanh", name=f"dense_{i}")
        dense.trainable = i >= workload.frozen_layers
        x = dense(x)
    return x
