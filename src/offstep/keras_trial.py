"""A training that is timed, with one callback: what `offstep bench` runs in a process of its own.

    python -m offstep.keras_trial SPEC ANSWER       SPEC is JSON of `trial.Spec`; that of a `Trial` goes to ANSWER

The model is a chain of `Dense` layers under Adam: a third of the state is weights, as in most trainings. A step that
is shorter than wanted gets more work for the device. Every step is waited for, whoever saves: what passes between the
end of one and the begin of the next is then what callbacks take, and a step that a save makes longer is seen as such.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from offstep import commit
from offstep.trial import Run, Spec, Trial

_BATCH_ROWS = 8
_WARMUP_SAVES = 2  # the first ones start threads and processes, and touch memory
_FIRST_STEPS = 3  # hold compilation
_PLAIN_SECONDS = 3.0  # how long the training without a callback is looked at, each time
_SIDE = 512

Model = Any  # Keras carries no types
Step = Callable[[Any, Any], tuple[Any, Any]]  # of Keras's trainer: state, iterator → logs, state


class Stopwatch:
    """Takes the times of the steps of one `fit` at a time. Training thread only."""

    def __init__(self) -> None:
        self.rounds = 0
        self._work = jax.jit(lambda square, rounds: jax.lax.fori_loop(0, rounds, lambda _, x: x @ x, square))
        self._square = jnp.full((_SIDE, _SIDE), 1 / _SIDE)  # its own square: nothing overflows
        self.begin(0, lambda: None)

    def begin(self, first: int, drain: Callable[[], object]) -> None:
        """Sets the clock back; it will start after `first` steps, when `drain` has returned."""
        self._first, self._drain = first, drain
        self.begun: list[float] = []
        self.ended: list[float] = []
        self.opened_at = self.closed_at = 0.0

    def wrap(self, step: Step) -> Step:
        """Returns the train function with the clock around it."""

        def timed_step(state: Any, iterator: Any) -> tuple[Any, Any]:
            if len(self.ended) == self._first:
                self._drain()
                self.opened_at = time.perf_counter()
            self.begun.append(time.perf_counter())
            logs, state = step(state, iterator)
            _wait(state)
            if self.rounds:
                self.work(self.rounds)
            self.ended.append(time.perf_counter())
            return logs, state

        return timed_step

    def work(self, rounds: int) -> None:
        """Keeps the device busy."""
        _wait(self._work(self._square, rounds))

    def close(self) -> None:
        """Stops the clock, once nothing is in flight."""
        self._drain()
        self.closed_at = time.perf_counter()

    def read_gap(self, step: int) -> float:
        """Returns the seconds from the end of a step, counted from 1, to the begin of the next one."""
        return self.begun[step] - self.ended[step - 1]


class Closing(keras.callbacks.Callback):  # type: ignore[misc]  # Keras carries no types
    """Stops the clock at the end of `fit`, before what is done there once, however many saves there were."""

    def __init__(self, close: Callable[[], object]) -> None:
        super().__init__()
        self._close = close

    def on_train_end(self, logs: object = None) -> None:
        """Is called before that of the callback that is timed."""
        self._close()


@dataclass(frozen=True)
class Peer:
    """A callback, and how its saves are waited for."""

    callback: Any  # of Keras
    drain: Callable[[], object] = lambda: None
    read_durable: Callable[[], list[float]] | None = None


def _make_offstep(directory: Path, every: int, suffix: str = "") -> Peer:
    from offstep.callbacks import ModelCheckpoint

    callback = ModelCheckpoint(f"{directory}/{{step}}{suffix}", save_freq=every, max_to_keep=1)

    def read_durable() -> list[float]:
        return [save.durable_seconds for save in callback.stats if save.durable_seconds is not None]

    return Peer(callback, callback.wait_until_finished, read_durable)


def _make_offstep_keras(directory: Path, every: int) -> Peer:
    return _make_offstep(directory, every, ".keras")


def _make_model_checkpoint(directory: Path, every: int) -> Peer:
    return Peer(keras.callbacks.ModelCheckpoint(directory / "newest.keras", save_freq=every))


def _make_orbax_checkpoint(directory: Path, every: int) -> Peer:
    callback = keras.callbacks.OrbaxCheckpoint(str(directory), save_freq=every, max_to_keep=1)
    return Peer(callback, callback.wait_until_finished)


_MAKERS = {
    "offstep": _make_offstep,
    "offstep_keras": _make_offstep_keras,
    "model_checkpoint": _make_model_checkpoint,
    "orbax_checkpoint": _make_orbax_checkpoint,
}


def run(spec: Spec) -> Trial:
    """Trains without a callback, then with one at each frequency, then without one again."""
    model = make_model(spec.state_bytes, spec.leaves)
    watch = Stopwatch()
    model.make_train_function()
    model.train_function = watch.wrap(model.train_function)
    _train(model, watch, _FIRST_STEPS)
    watch.rounds = _calibrate(model, watch, spec.step_seconds) if spec.rounds is None else spec.rounds
    before, gap = _run_plain(model, watch, spec.step_seconds)
    runs = [_run_saving(model, watch, spec, every, gap) for every in spec.every]
    after, _ = _run_plain(model, watch, spec.step_seconds)
    arrays = {id(variable): variable.value for variable in [*model.variables, *model.optimizer.variables]}
    return Trial(
        peer=spec.peer,
        state_bytes=sum(array.nbytes for array in arrays.values()),
        leaves=len(arrays),
        device=_describe_device(),
        rounds=watch.rounds,
        plain_seconds=(before, after),
        runs=tuple(runs),
    )


def make_model(state_bytes: int, leaves: int) -> Model:
    """Returns a compiled model with about so many bytes of state in so many arrays."""
    count = max(1, round((leaves - 2) / 6))  # of each layer: kernel, bias, and Adam's two for each
    width = max(1, round(math.sqrt(state_bytes / (12 * count))))
    inputs = x = keras.Input((width,))
    for number in range(count):
        x = keras.layers.Dense(width, activation="tanh", name=f"dense_{number}")(x)
    model = keras.Model(inputs, x)
    model.compile("adam", "mse")
    return model


def _train(model: Model, watch: Stopwatch, steps: int, *callbacks: Any) -> None:  # of Keras
    samples = np.zeros((_BATCH_ROWS * steps, model.input_shape[1]), np.float32)
    callbacks = (Closing(watch.close), *callbacks)
    model.fit(samples, samples, batch_size=_BATCH_ROWS, shuffle=False, verbose=0, callbacks=[*callbacks])


def _calibrate(model: Model, watch: Stopwatch, step_seconds: float) -> int:
    """Returns how many rounds make a step as long as it shall be; 0 where it is longer anyway."""
    watch.begin(_FIRST_STEPS, lambda: None)
    _train(model, watch, 3 * _FIRST_STEPS)
    times = [end - begin for begin, end in zip(watch.begun, watch.ended, strict=True)]
    missing = step_seconds - median(times[_FIRST_STEPS:])
    if missing <= 0:
        return 0
    rounds = 1
    while (seconds := _time_work(watch, rounds)) < min(missing, 0.05):
        rounds *= 2
    return max(1, round(missing / seconds * rounds))


def _time_work(watch: Stopwatch, rounds: int) -> float:
    watch.work(rounds)
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        watch.work(rounds)
        times.append(time.perf_counter() - begun)
    return median(times)


def _run_plain(model: Model, watch: Stopwatch, step_seconds: float) -> tuple[tuple[float, ...], float]:
    """Returns the seconds of each step without a callback, and of the gap between two."""
    steps = round(min(200, max(10, _PLAIN_SECONDS / step_seconds)))
    watch.begin(_FIRST_STEPS, lambda: None)
    _train(model, watch, _FIRST_STEPS + steps)
    begun = [*watch.begun[_FIRST_STEPS:], watch.closed_at]
    gap = fmean(watch.read_gap(step) for step in range(_FIRST_STEPS, _FIRST_STEPS + steps))
    return tuple(end - begin for begin, end in itertools.pairwise(begun)), gap


def _run_saving(model: Model, watch: Stopwatch, spec: Spec, every: int, gap: float) -> Run:
    directory = Path(spec.directory, f"every-{every}")
    directory.mkdir()
    peer = _MAKERS[spec.peer](directory, every)
    warmup = every * _WARMUP_SAVES
    steps = warmup + every * spec.saves + every - 1  # the last save is followed by as many steps as the others
    drained: list[float] = []

    def drain() -> None:
        peer.drain()
        drained.append(time.perf_counter() - watch.ended[-1])

    watch.begin(warmup, drain)
    _train(model, watch, steps, peer.callback)
    finished = peer.read_durable() if peer.read_durable else drained[:1]
    commit.delete(directory)
    saved = range(warmup + every, steps, every)  # of them that a step follows
    return Run(
        every=every,
        saves=spec.saves,
        wall_seconds=watch.closed_at - watch.opened_at,
        call_seconds=tuple(max(0.0, watch.read_gap(step) - gap) for step in saved),
        finished_seconds=tuple(finished[-spec.saves :]),
        steps=tuple(
            (begin - watch.opened_at, end - watch.opened_at)
            for begin, end in zip(watch.begun[warmup:], watch.ended[warmup:], strict=True)
        ),
    )


def _wait(arrays: Any) -> None:  # any pytree
    jax.block_until_ready(arrays)  # type: ignore[no-untyped-call]


def _describe_device() -> str:
    devices = jax.devices()
    more = f" and {len(devices) - 1} more" if len(devices) > 1 else ""
    return f"{devices[0].platform}:{devices[0].id} {devices[0].device_kind}{more}"


if __name__ == "__main__":
    answer = run(Spec.from_json(sys.argv[1]))
    Path(sys.argv[2]).write_text(answer.to_json())
