"""How is each peer set up, so that its own engineers would accept it?

Every factory takes a `Setup` and returns a `Contender`. All peers run in a real `model.fit` and save the whole state,
Adam's slots included; those that have retention keep the newest two checkpoints.

What "tuned" means for Orbax (0.12, one process, one device, local disk), each line because it removes work:

- `use_compression=False`: zstd saves 7 % on float32 weights and costs most of the CPU time.
- `ocdbt_target_data_file_size=0`: no new data file at 2 GB.
- `enable_post_merge_validation=False`: the merged checkpoint is not read back.
- `use_replica_parallel=False`: on one device nothing is replicated, so slicing by replica is skipped.
- `array_metadata_store=None`: one side file with an entry per leaf less.
- `skip_sync_file_validations=True`: no look at the file system on the training thread before an asynchronous save.
- AsyncCheckpointer and CheckpointManager only: `enable_write_sharding_file=False`, since who restores with them names
  the sharding; stock `keras.saving.load_model` needs that file, so `OrbaxCheckpoint` keeps it. The live state is
  handed over without Keras's variable sync.
- CheckpointManager only: `enable_background_delete=True`, `save_root_metadata=False`.

Tried, and left as they are because time per save got worse or stayed within the noise (600 MB in 78 arrays, 15 MB in
1,800): OCDBT off, 4 MB chunks, 64 MB data files, directories made synchronously, zarr2, a limit on bytes in flight.
TensorStore's I/O concurrency is 128 already.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import keras
import numpy as np
from equalise import fsync_tree
from peers import LEAVING_OUT

if TYPE_CHECKING:
    import orbax.checkpoint as ocp
    from orbax.checkpoint import v1

KEEP = 2
Arrays = dict[str, dict[str, jax.Array]]

_NEVER = 1_000_000  # batches


@dataclass(frozen=True)
class Setup:
    """What a peer is asked to do.

    Attributes:
        directory: Empty directory for its checkpoints.
        save_freq: Batches from one save to the next.
        equalise: The peer shall make its files durable itself, where it saves in its own call.
    """

    directory: Path
    save_freq: int
    equalise: bool = False


@dataclass(frozen=True)
class Contender:
    """One peer, ready for `fit`.

    Attributes:
        callback: Goes into `fit`; `None` for the baseline.
        drain: Returns once nothing is in flight.
        outcomes: Step to what the peer itself recorded about that save.
    """

    callback: keras.callbacks.Callback | None
    drain: Callable[[], object] = lambda: None
    outcomes: Callable[[], dict[int, dict[str, Any]]] = field(default=dict)  # numbers and text, for JSON


def make_contender(name: str, setup: Setup) -> Contender:
    """Returns the peer called `name`."""
    return _FACTORIES[name](setup)


class Idle(keras.callbacks.Callback):
    """Does nothing, but overrides the hook that a saving callback overrides."""

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        pass


def _offstep(suffix: str = "", **options: Any) -> Callable[[Setup], Contender]:  # arguments of Keras
    def make(setup: Setup) -> Contender:
        from offstep import ModelCheckpoint

        template = f"{setup.directory}/{{step}}{suffix}"
        callback = ModelCheckpoint(template, save_freq=setup.save_freq, max_to_keep=KEEP, **options)

        def outcomes() -> dict[int, dict[str, Any]]:  # numbers and text, for JSON
            names = ("call_seconds", "wait_seconds", "durable_seconds", "cpu_seconds", "error")
            return {save.step: {name: getattr(save, name) for name in names} for save in callback.stats}

        return Contender(callback, callback.wait_until_finished, outcomes)

    return make


def _leaving_out(parts: Sequence[str]) -> Callable[[Setup], Contender]:
    def make(setup: Setup) -> Contender:
        import leaving_out

        leaving_out.install(parts)
        return _offstep()(setup)

    return make


class FsyncedModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """The stock callback, with the fsync that makes its file durable."""

    def _save_model(self, epoch: int, batch: int | None, logs: dict[str, float] | None) -> None:
        super()._save_model(epoch, batch, logs)
        fsync_tree(Path(self._get_file_path(epoch, batch, logs)))


def _model_checkpoint(suffix: str, **options: Any) -> Callable[[Setup], Contender]:  # arguments of Keras
    def make(setup: Setup) -> Contender:
        cls = FsyncedModelCheckpoint if setup.equalise else keras.callbacks.ModelCheckpoint
        return Contender(cls(f"{setup.directory}/{{batch}}{suffix}", save_freq=setup.save_freq, **options))

    return make


def _orbax_checkpoint(setup: Setup) -> Contender:
    callback = keras.callbacks.OrbaxCheckpoint(
        str(setup.directory), save_freq=setup.save_freq, max_to_keep=KEEP, save_on_background=True
    )
    return Contender(callback, callback.wait_until_finished)


class TunedCheckpointer:
    """Enters a tuned context around each save; `keras.callbacks.OrbaxCheckpoint` enters a default one."""

    def __init__(self, inner: v1.training.Checkpointer) -> None:
        self.inner = inner
        self.wait, self.close = inner.wait, inner.close

    def save_checkpointables_async(self, step: int, payload: dict[str, object]) -> object:
        with tuned_context():
            return self.inner.save_checkpointables_async(step, payload)


def tuned_context() -> v1.Context:
    """Returns the Orbax context that the module's docstring explains."""
    from orbax.checkpoint import v1

    context = v1.Context()
    saving = context.array.saving
    saving.use_compression = False
    saving.ocdbt_target_data_file_size = 0
    saving.enable_post_merge_validation = False
    saving.use_replica_parallel = False
    saving.array_metadata_store = None
    context.file.skip_sync_file_validations = True
    return context


def _orbax_checkpoint_tuned(setup: Setup) -> Contender:
    with tuned_context():
        contender = _orbax_checkpoint(setup)
    callback = contender.callback
    callback.checkpointer = TunedCheckpointer(callback.checkpointer)
    return contender


class ThreadedSave(keras.callbacks.Callback):
    """The 15 lines that people write themselves: copy, then `numpy.savez` in a thread."""

    suffix = ".npz"

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup, self.thread = setup, threading.Thread()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if (batch + 1) % self.setup.save_freq == 0:
            self.wait()
            # Keras's flatten, because Keras tracks the attribute and JAX would take its dict for a leaf.
            state = [np.array(leaf) for leaf in keras.tree.flatten(self.model._jax_state)]
            self.thread = threading.Thread(target=self.save, args=(batch + 1, state))
            self.thread.start()

    def save(self, step: int, state: list[np.ndarray]) -> None:
        partial = self.setup.directory / f"partial{self.suffix}"
        self.write(partial, state)
        partial.rename(self.setup.directory / f"{step}{self.suffix}")
        (self.setup.directory / f"{step - KEEP * self.setup.save_freq}{self.suffix}").unlink(missing_ok=True)

    def write(self, path: Path, state: list[np.ndarray]) -> None:
        np.savez(path, *state)

    def wait(self) -> None:
        if self.thread.ident:
            self.thread.join()


class ThreadedSafetensors(ThreadedSave):
    """The same with the safetensors format."""

    suffix = ".safetensors"

    def write(self, path: Path, state: list[np.ndarray]) -> None:
        from safetensors.numpy import save_file

        save_file({str(i): leaf for i, leaf in enumerate(state)}, path)


def _threaded(cls: type[ThreadedSave]) -> Callable[[Setup], Contender]:
    def make(setup: Setup) -> Contender:
        callback = cls(setup)
        return Contender(callback, callback.wait)

    return make


class OnSchedule(keras.callbacks.Callback):
    """Calls `save(step, state)` every `save_freq` batches with the live state, without Keras's variable sync."""

    def __init__(self, save_freq: int, save: Callable[[int, Arrays], object]) -> None:
        super().__init__()
        self.save_freq, self.save = save_freq, save

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if (batch + 1) % self.save_freq == 0:
            self.save(batch + 1, name_state(self.model))


def name_state(model: keras.Model) -> Arrays:
    """Returns the live state as `{"trainable_variables": {path: array}, ...}`."""
    groups = {
        "trainable_variables": model.trainable_variables,
        "non_trainable_variables": model.non_trainable_variables,
        "optimizer_variables": model.optimizer.variables,
    }
    live = model._jax_state
    return {
        group: {variable.path.replace("/", "."): array for variable, array in zip(variables, live[group], strict=True)}
        for group, variables in groups.items()
    }


def _orbax_async(tuned: bool) -> Callable[[Setup], Contender]:
    def make(setup: Setup) -> Contender:
        import orbax.checkpoint as ocp

        options = {"file_options": _tuned_file_options()} if tuned else {}
        handler = _tuned_handler() if tuned else ocp.StandardCheckpointHandler()
        checkpointer = ocp.AsyncCheckpointer(handler, **options)
        save_args = _tuned_args if tuned else ocp.args.StandardSave

        def save(step: int, state: Arrays) -> None:
            checkpointer.save(setup.directory / str(step), args=save_args(state))

        return Contender(OnSchedule(setup.save_freq, save), checkpointer.wait_until_finished)

    return make


def _orbax_manager(tuned: bool) -> Callable[[Setup], Contender]:
    def make(setup: Setup) -> Contender:
        import orbax.checkpoint as ocp

        options, handlers = {}, None
        if tuned:
            options = {"enable_background_delete": True, "save_root_metadata": False}
            options["file_options"] = _tuned_file_options()
            handlers = _tuned_handler()
        options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, **options)
        manager = ocp.CheckpointManager(setup.directory, options=options, item_handlers=handlers)
        save_args = _tuned_args if tuned else ocp.args.StandardSave

        def save(step: int, state: Arrays) -> None:
            manager.save(step, args=save_args(state))

        return Contender(OnSchedule(setup.save_freq, save), manager.wait_until_finished)

    return make


def _tuned_handler() -> ocp.PyTreeCheckpointHandler:
    import orbax.checkpoint as ocp

    types = ocp.type_handlers
    array_handler = types.ArrayHandler(use_replica_parallel=False, enable_write_sharding_file=False)
    registry = types.create_type_handler_registry((jax.Array, array_handler))
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False, type_handler_registry=registry)


def _tuned_args(state: Arrays) -> ocp.args.PyTreeSave:
    import orbax.checkpoint as ocp

    return ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=0)


def _tuned_file_options() -> ocp.options.FileOptions:
    import orbax.checkpoint as ocp

    return ocp.options.FileOptions(skip_sync_file_validations=True)


def _torch_dcp(setup: Setup) -> Contender:
    """PyTorch's asynchronous distributed checkpoint of tensors that are copies of the arrays."""
    import torch
    import torch.distributed.checkpoint as dcp

    finished: dict[int, dict[str, float]] = {}
    pending: list[Any] = []  # concurrent futures

    def save(step: int, state: Arrays) -> None:
        drain()
        tensors = {
            f"{group}.{path}": torch.from_numpy(np.array(array))
            for group, arrays in state.items()
            for path, array in arrays.items()
        }
        future = dcp.async_save(tensors, checkpoint_id=setup.directory / str(step))
        pending.append(getattr(future, "upload_completion", future))
        pending[-1].add_done_callback(lambda _: finished.update({step: {"finished_at": time.perf_counter()}}))
        shutil.rmtree(setup.directory / str(step - KEEP * setup.save_freq), ignore_errors=True)

    def drain() -> None:
        while pending:
            pending.pop().result()

    return Contender(OnSchedule(setup.save_freq, save), drain, lambda: finished)


_FACTORIES: dict[str, Callable[[Setup], Contender]] = {
    "none": lambda setup: Contender(None),
    "idle": lambda setup: Contender(Idle()),
    "offstep": _offstep(),
    "offstep_keras": _offstep(".keras"),
    "offstep_weights": _offstep(".weights.h5", save_weights_only=True),
    **{name: _leaving_out(parts) for name, parts in LEAVING_OUT.items()},
    "model_checkpoint": _model_checkpoint(".keras"),
    "model_checkpoint_weights": _model_checkpoint(".weights.h5", save_weights_only=True),
    "offstep_never": lambda setup: _offstep()(replace(setup, save_freq=_NEVER)),
    "model_checkpoint_never": lambda setup: _model_checkpoint(".keras")(replace(setup, save_freq=_NEVER)),
    "orbax_checkpoint": _orbax_checkpoint,
    "orbax_checkpoint_tuned": _orbax_checkpoint_tuned,
    "thread_npz": _threaded(ThreadedSave),
    "orbax_async": _orbax_async(tuned=False),
    "orbax_async_tuned": _orbax_async(tuned=True),
    "orbax_manager": _orbax_manager(tuned=False),
    "orbax_manager_tuned": _orbax_manager(tuned=True),
    "thread_safetensors": _threaded(ThreadedSafetensors),
    "torch_dcp": _torch_dcp,
}
