"""What does one run of `model.fit` with one peer cost? (Runs in a fresh process; prints nothing, writes JSON.)

How a save is timed, the same for every peer and for the run without a callback:

- `fit` calls the train function through a wrapper of ours. After a step that is followed by a save the wrapper waits
  until the step's state is computed, on the training thread, whoever saves. So `t_call` is the save and never the
  rest of the computation, and every run, the baseline included, waits at the same steps.
- `t_call` is the time that the peer's own hooks take on the training thread between that step and the next one,
  whichever hooks it saves in (`on_train_batch_end` of the step, `on_train_batch_begin` of the next).
- The step after a save is awaited as well, by everyone: a peer whose snapshot keeps views of live arrays returns at
  once, and that step then pays for copying what XLA could otherwise have overwritten. `next_step_seconds` shows it.
- The clock starts after the warm-up saves, when nothing is in flight, and stops twice: after the last step, and once
  everything is finished (for the durable peers: durable). The last save is followed by one more step.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from workloads import Workload, build

if TYPE_CHECKING:
    import keras

P = ParamSpec("P")
T = TypeVar("T")
Step = Callable[[tuple[object, ...], object], tuple[object, tuple[object, ...]]]

HOOKS = (
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_batch_begin",  # where Keras's own hooks for training batches go on to
    "on_batch_end",
)


@dataclass(frozen=True)
class RunSpec:
    """One run: who saves what, where.

    Attributes:
        workload: The model and its schedule.
        peer: Name of the peer.
        directory: Empty directory for checkpoints.
        seed: Seeds weights and samples.
        equalise: Peers that are not durable shall be made so.
        barrier: Wait for the state before a save (see the module's docstring).
    """

    workload: Workload
    peer: str
    directory: str
    seed: int = 0
    equalise: bool = False
    barrier: bool = True

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunSpec:
        data = json.loads(text)
        return cls(**{**data, "workload": Workload(**data["workload"])})


@dataclass
class RunResult:
    """What one run cost; times of `opened_at` and `closed_at` are `time.perf_counter` (CLOCK_MONOTONIC).

    Attributes:
        peer: Name of the peer.
        state_bytes: Bytes of the model's state.
        state_variables: Number of its arrays.
        opened_at: When the clock started.
        closed_at: When everything was finished.
        steps_seconds: From the start of the clock until the last step was done.
        wall_seconds: From the start of the clock until everything was finished.
        cpu_seconds: CPU time of the process and its children in that time.
        other_hook_seconds: Time of the peer's hooks per step that is not followed by a save.
        checkpoint_bytes: Bytes of the newest checkpoint.
        saves: One record per save: step, started_at, call_seconds, gap_seconds (from step to step, Keras's
            part included), next_step_seconds, and what the peer itself recorded.
    """

    peer: str
    state_bytes: int
    state_variables: int
    opened_at: float = 0.0
    closed_at: float = 0.0
    steps_seconds: float = 0.0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    other_hook_seconds: float = 0.0
    checkpoint_bytes: int = 0
    saves: list[dict[str, Any]] = field(default_factory=list)  # numbers and text, for JSON


class Probe:
    """Takes the times of one `fit`: of each step, and of a callback's hooks between steps. Training thread only."""

    def __init__(self, workload: Workload, drain: Callable[[], object], barrier: bool) -> None:
        self.workload = workload
        self.drain = drain
        self.barrier = barrier
        self.entered: list[float] = []
        self.left: list[float] = []
        self.hook_seconds: dict[int, float] = defaultdict(float)
        self.opened_at = 0.0
        self.cpu_at_opening = 0.0
        self._in_hook = False
        self._thread = threading.get_ident()

    @property
    def steps_done(self) -> int:
        return len(self.left)

    def wrap_step(self, step: Step) -> Step:
        """Returns the train function with the clock around it."""
        import jax

        first = self.workload.save_freq * self.workload.warmup_saves

        def timed_step(state: tuple[object, ...], iterator: object) -> tuple[object, tuple[object, ...]]:
            if self.steps_done == first:
                self.open()
            self.entered.append(time.perf_counter())
            logs, state = step(state, iterator)
            if self._is_awaited(self.steps_done + 1):
                jax.block_until_ready(state)
            self.left.append(time.perf_counter())
            return logs, state

        return timed_step

    def open(self) -> None:
        """Starts the clock, once nothing of the warm-up is in flight."""
        self.drain()
        self.cpu_at_opening = read_cpu_seconds()
        self.opened_at = time.perf_counter()

    def wrap_hooks(self, callback: keras.callbacks.Callback) -> None:
        """Puts the clock around each hook that the callback overrides."""
        for name in HOOKS:
            hook = getattr(callback, name)
            # Keras marks inherited hooks so and skips asynchronous dispatch only for overridden ones.
            if not getattr(hook, "_is_default", False):
                setattr(callback, name, self._timed(hook))

    def _timed(self, hook: Callable[P, T]) -> Callable[P, T]:
        @wraps(hook)
        def timed_hook(*args: P.args, **kwargs: P.kwargs) -> T:
            if self._in_hook or threading.get_ident() != self._thread:
                return hook(*args, **kwargs)
            self._in_hook = True
            start = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                self.hook_seconds[self.steps_done] += time.perf_counter() - start
                self._in_hook = False

        return timed_hook

    def _is_awaited(self, step: int) -> bool:
        is_around_save = self.barrier and step % self.workload.save_freq in (0, 1)
        return is_around_save or step == self.workload.steps

    def measured_steps(self) -> range:
        """Steps within the clock that a save follows."""
        freq = self.workload.save_freq
        return range(freq * (self.workload.warmup_saves + 1), self.workload.steps, freq)


def run(spec: RunSpec) -> RunResult:
    """Trains once and returns what it cost."""
    from peer_callbacks import Setup, make_contender

    model, samples = build(spec.workload, spec.seed)
    contender = make_contender(spec.peer, Setup(Path(spec.directory), spec.workload.save_freq, spec.equalise))
    probe = Probe(spec.workload, contender.drain, spec.barrier)
    callbacks = [contender.callback] if contender.callback else []
    for callback in callbacks:
        probe.wrap_hooks(callback)
    model.make_train_function()
    model.train_function = probe.wrap_step(model.train_function)
    model.fit(samples, samples, batch_size=spec.workload.batch, shuffle=False, verbose=0, callbacks=callbacks)
    contender.drain()
    return _conclude(spec, model, probe, contender.outcomes())


def _conclude(spec: RunSpec, model: keras.Model, probe: Probe, outcomes: dict[int, dict[str, Any]]) -> RunResult:
    closed_at = time.perf_counter()
    cpu_seconds = read_cpu_seconds() - probe.cpu_at_opening
    variables = [*model.variables, *model.optimizer.variables]
    variables = list({id(variable): variable for variable in variables}.values())
    # Means over all that is not a save; the hooks of `on_train_end` come after the last step and are left out.
    first = probe.workload.save_freq * probe.workload.warmup_saves
    others = [s for s in range(first + 1, spec.workload.steps) if s % spec.workload.save_freq]
    return RunResult(
        peer=spec.peer,
        state_bytes=sum(variable.value.nbytes for variable in variables),
        state_variables=len(variables),
        opened_at=probe.opened_at,
        closed_at=closed_at,
        steps_seconds=probe.left[-1] - probe.opened_at,
        wall_seconds=closed_at - probe.opened_at,
        cpu_seconds=cpu_seconds,
        other_hook_seconds=sum(probe.hook_seconds.get(s, 0.0) for s in others) / max(1, len(others)),
        checkpoint_bytes=newest_checkpoint_bytes(Path(spec.directory)),
        saves=[_describe_save(probe, step, outcomes.get(step, {})) for step in probe.measured_steps()],
    )


def _describe_save(probe: Probe, step: int, outcome: dict[str, Any]) -> dict[str, Any]:  # numbers, for JSON
    return {
        "step": step,
        "started_at": probe.left[step - 1],
        "call_seconds": probe.hook_seconds.get(step, 0.0),
        "gap_seconds": probe.entered[step] - probe.left[step - 1],
        "next_step_seconds": probe.left[step] - probe.entered[step],
        "own": outcome,
    }


def read_cpu_seconds() -> float:
    """Returns CPU seconds, user and system, of this process and all its children, running or gone."""
    import psutil

    gone = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + gone.ru_utime + gone.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def newest_checkpoint_bytes(directory: Path) -> int:
    """Returns the bytes of files in the entry of `directory` with the highest step."""
    names = {entry: entry.name.split(".")[0] for entry in directory.iterdir()}
    steps = {int(name): entry for entry, name in names.items() if name.isdigit()}
    if not steps:
        return 0
    newest = steps[max(steps)]
    files = newest.rglob("*") if newest.is_dir() else [newest]
    return sum(file.stat().st_size for file in files if file.is_file())


def _fail_on_thread_error(args: threading.ExceptHookArgs) -> None:
    """Ends the process: a peer whose background save failed must not look fast."""
    threading.__excepthook__(args)
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    threading.excepthook = _fail_on_thread_error
    result = run(RunSpec.from_json(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(asdict(result)))
    sys.stdout.flush()
    os._exit(0)  # Everything is finished: interpreter shutdown is not measured, and may take long.
