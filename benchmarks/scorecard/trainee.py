"""Trains and saves, and says on stdout what it submitted and what it was told is durable.

Lines: `submitted STEP`, `durable STEP`, `done` when the training has ended normally and all that was submitted counts
as reported. What "reported durable" means for a peer:

- offstep: its durable event.
- stock ModelCheckpoint: the save returned.
- Orbax, asynchronous: `wait_until_finished()` returned, which the trainee calls two batches after a save.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model import Shape, make_batches, make_inputs, make_model
from peers import PEERS, Peer

_WAIT_AFTER_BATCHES = 2


@dataclass
class Spec:
    """What a trainee shall do.

    Attributes:
        peer: Name of who saves.
        directory: Where to.
        shape: Of the model, as JSON.
        epochs: Of a `fit`; a loop just makes as many batches.
        batches: Of an epoch.
        save_every: Batches from save to save; 0 saves after each epoch.
        keep: How many checkpoints stay.
        file: The one file that is replaced; `None` where each step has a name of its own.
        template: A path in the place of that, below the directory.
        first_step: What the optimizer has counted before.
        delay_seconds: How much longer each batch takes.
        options: More arguments of the saver.
        acts: What happens at which batch, before it is trained: `{"batch": int, "call": "module:function", ...}`; the
            function is given the `Trainee` and what else is there.
        edit_logs: `"module:function"` that changes the logs of an epoch before the saver sees them.
        nan_from: The batch from which on the weights are NaN.
        closes: Whether a loop closes its saver at the end.
        writer: What the writer process shall suffer; see `writer_entry`.
    """

    peer: str
    directory: str
    shape: dict[str, int] = field(default_factory=dict)
    epochs: int = 1
    batches: int = 60
    save_every: int = 5
    keep: int = 2
    file: str | None = None
    template: str | None = None
    first_step: int = 0
    delay_seconds: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)  # JSON
    acts: list[dict[str, Any]] = field(default_factory=list)  # JSON
    edit_logs: str | None = None
    nan_from: int | None = None
    closes: bool = True
    writer: dict[str, Any] | None = None  # JSON


class Stop(Exception):
    """Ends a training by hand; the script ends normally."""


class Trainee:
    """One training, with its saver; acts are given this."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.peer: Peer = PEERS[spec.peer]
        self.shape = Shape(**spec.shape)
        self.directory = Path(spec.directory)
        self.model: Any = None  # Keras carries no types
        self.saver: Any = None  # the peer's own object
        self.batch = 0  # begun so far
        self.submitted: list[int] = []
        self.waited = 0  # how many of them have been waited for; with ours, how many have been looked at

    @property
    def template(self) -> str:
        """The path of a callback that takes templates."""
        return str(self.directory / (self.spec.template or self.spec.file or f"{{step}}{self.peer.suffix}"))

    def submit(self, step: int) -> None:
        """Says that a save has been accepted."""
        self.submitted.append(step)
        say("submitted", step)

    def begin_batch(self) -> None:
        """Does what shall happen before the next batch, once the saver has had its turn."""
        self.batch += 1
        time.sleep(self.spec.delay_seconds)
        for act in self.spec.acts:
            if act["batch"] == self.batch:
                arguments = {key: value for key, value in act.items() if key not in ("batch", "call")}
                find(act["call"])(self, **arguments)

    def wait_now_and_then(self, wait: Callable[[], object]) -> None:
        """Waits for asynchronous saves as a user would who wants to know, and reports them."""
        pending = self.submitted[self.waited :]
        if pending and self.spec.first_step + self.batch > pending[0] + _WAIT_AFTER_BATCHES:
            wait()
            self.report_all()

    def report_all(self) -> None:
        """Reports what was submitted and waited for since the last time."""
        for step in self.submitted[self.waited :]:
            say("durable", step)
        self.waited = len(self.submitted)


def say(*words: object) -> None:
    """Writes one line at once, whatever becomes of this process."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def find(name: str) -> Callable[..., Any]:
    """Returns what `"module:function"` names."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def main(arguments: dict[str, Any]) -> None:
    """Trains to the end, if nothing comes between."""
    trainee = Trainee(Spec(**arguments))
    if trainee.peer.is_ours and trainee.spec.writer is not None:
        import writer_entry

        writer_entry.install(trainee.spec.writer)
    with suppress(Stop):
        if trainee.peer.in_fit:
            fit(trainee)
        else:
            _LOOPS[trainee.peer.name](trainee)
    say("done")


# ------------------------------------------------------------------------------------------------------ in a real fit


def fit(trainee: Trainee) -> None:
    """Trains with the peer's callback."""
    spec = trainee.spec
    trainee.model = make_model(trainee.shape)
    trainee.model.optimizer.build(trainee.model.trainable_variables)
    if spec.first_step:
        resume_at(trainee, spec.first_step)
    trainee.saver = _CALLBACKS[trainee.peer.name](trainee)
    edit = None if spec.edit_logs is None else find(spec.edit_logs)
    trainee.model.fit(
        make_batches(trainee.shape, spec.nan_from),
        epochs=spec.epochs,
        steps_per_epoch=spec.batches,
        verbose=0,
        callbacks=[*([] if edit is None else [make_editor(edit)]), trainee.saver, make_follower(trainee)],
    )


def resume_at(trainee: Trainee, step: int) -> None:
    """Gives the model the values of a step, as a restored one would have."""
    from model import expect

    for layer, weights in expect(trainee.shape, step).items():
        trainee.model.get_layer(layer).set_weights([weights["kernel"], weights["bias"]])
    trainee.model.optimizer.iterations.assign(step)


def make_editor(edit: Callable[[int, dict[str, float]], None]) -> Any:  # a Keras callback
    """Returns a callback that changes the logs of each epoch."""
    import keras

    class Editor(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
            if logs is not None:
                edit(epoch, logs)

    return Editor()


def make_follower(trainee: Trainee) -> Any:  # a Keras callback
    """Returns a callback for after the saver. It overrides no hook that would switch Keras's dispatch off."""
    import keras

    class Follower(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self._follow()
            trainee.begin_batch()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self._follow()

        def _follow(self) -> None:
            if trainee.peer.is_ours:
                for save in trainee.saver.stats[trainee.waited :]:
                    trainee.waited += 1
                    if not save.skipped:
                        trainee.submit(save.step)
            elif hasattr(trainee.saver, "wait_until_finished"):
                trainee.wait_now_and_then(trainee.saver.wait_until_finished)

    return Follower()


def make_offstep(trainee: Trainee) -> Any:  # a Keras callback
    """Returns our callback."""
    from offstep import ModelCheckpoint

    spec = trainee.spec
    options: dict[str, Any] = {"save_freq": spec.save_every or "epoch"}
    options["on_durable"] = lambda save: say("durable", save.step)
    if spec.file is None:
        options["max_to_keep"] = spec.keep
    options["save_weights_only"] = trainee.peer.reader == "weights"
    return ModelCheckpoint(trainee.template, **(options | spec.options))


def make_model_checkpoint(trainee: Trainee) -> Any:  # a Keras callback
    """Returns Keras's callback, which says when a save has returned."""
    import keras

    class Telling(keras.callbacks.ModelCheckpoint):
        is_saving = False

        def _should_save_model(self, *arguments: Any) -> bool:
            self.is_saving = super()._should_save_model(*arguments)
            return self.is_saving

        def _save_model(self, epoch: int, batch: int | None, logs: dict[str, float] | None) -> None:
            super()._save_model(epoch, batch, logs)
            if self.is_saving:
                trainee.submit(int(self.model.optimizer.iterations))
                trainee.report_all()

    options: dict[str, Any] = {"save_freq": trainee.spec.save_every or "epoch"}
    options["save_weights_only"] = trainee.peer.reader == "weights"
    return Telling(trainee.template.replace("{step}", "{batch}"), **(options | trainee.spec.options))


def make_orbax_checkpoint(trainee: Trainee) -> Any:  # a Keras callback
    """Returns Keras's callback on Orbax, which says when a save has been accepted."""
    import keras

    class Telling(keras.callbacks.OrbaxCheckpoint):
        def _save_checkpoint(self, step: int, logs: dict[str, float] | None = None) -> None:
            step = int(self.model.optimizer.iterations)  # after an epoch it would be the number of that
            super()._save_checkpoint(step, logs)
            trainee.submit(step)

    options = {"save_freq": trainee.spec.save_every or "epoch", "max_to_keep": trainee.spec.keep}
    return Telling(str(trainee.directory), **(options | trainee.spec.options))


_CALLBACKS: dict[str, Callable[[Trainee], Any]] = {
    "offstep": make_offstep,
    "offstep_keras": make_offstep,
    "offstep_weights": make_offstep,
    "model_checkpoint": make_model_checkpoint,
    "model_checkpoint_weights": make_model_checkpoint,
    "orbax_checkpoint": make_orbax_checkpoint,
}


# --------------------------------------------------------------------------------------------------- in a loop of JAX


def steps(trainee: Trainee) -> Iterator[tuple[int, dict[str, Any], dict[str, float]]]:
    """Yields each step with its state and metrics."""
    import jax

    spec = trainee.spec
    rows = make_inputs(trainee.shape)
    change = {f"branch_{i}": {"kernel": row.T, "bias": row[0, :1] * 0 + 1} for i, row in enumerate(rows)}
    state = jax.tree.map(lambda array: jax.numpy.asarray(-spec.first_step * array), change)
    update = jax.jit(lambda tree: jax.tree.map(jax.numpy.subtract, tree, change), donate_argnums=0)
    for step in range(spec.first_step + 1, spec.first_step + 1 + spec.epochs * spec.batches):
        trainee.begin_batch()
        state = update(state)
        if step == spec.nan_from:
            state = jax.tree.map(lambda array: array * math.nan, state)
        metrics: dict[str, float] = {}
        if spec.edit_logs is not None:
            find(spec.edit_logs)(step // spec.save_every - 1, metrics)
        yield step, state, metrics


def loop_checkpointer(trainee: Trainee) -> None:
    """Saves with our `Checkpointer`."""
    from offstep import Checkpointer

    spec = trainee.spec
    pending: list[Any] = []  # offstep.PendingSave
    trainee.saver = Checkpointer(trainee.directory, max_to_keep=spec.keep, **spec.options)
    for step, state, metrics in steps(trainee):
        if step % spec.save_every == 0:
            save = trainee.saver.save(step, state, metrics)
            if save is not None:
                trainee.submit(step)
                pending.append(save)
        while pending and pending[0].done():
            save = pending.pop(0)
            if save.error is None:
                say("durable", save.step)
    if spec.closes:
        trainee.saver.close()


def loop_manager(trainee: Trainee) -> None:
    """Saves with Orbax's `CheckpointManager`."""
    import orbax.checkpoint as ocp

    spec = trainee.spec
    best = {"best_fn": lambda metrics: metrics["val_loss"], "best_mode": "min"} if spec.edit_logs else {}
    options = ocp.CheckpointManagerOptions(max_to_keep=spec.keep, **best, **spec.options)
    trainee.saver = ocp.CheckpointManager(trainee.directory, options=options)
    for step, state, metrics in steps(trainee):
        if step % spec.save_every == 0:
            trainee.saver.save(step, args=ocp.args.StandardSave(state), metrics=metrics or None)
            trainee.submit(step)
        trainee.wait_now_and_then(trainee.saver.wait_until_finished)
    if spec.closes:
        trainee.saver.close()


_LOOPS: dict[str, Callable[[Trainee], None]] = {
    "offstep_tree": loop_checkpointer,
    "orbax_manager": loop_manager,
}
