"""What a Keras model looks like after stock Keras rebuilt it from its config in a fresh process.

Each private part of Keras is looked up when it is needed, and has a public way beside it for a Keras without it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import random
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import keras
import numpy as np

Model = Any  # Keras carries no types
Variable = Any  # nor has it one class of variables for all its modes

GROUPS = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
EAGER_REBUILD_BYTES = 256 * 2**20
"""Up to this size of state a rebuild may allocate it a second time, in host memory."""


@dataclass(frozen=True)
class VariableRecord:
    """What two variables must agree in to be the same one in the live and in the rebuilt model."""

    key: int
    group: str
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def path(self) -> tuple[str, ...]:
        return (self.group, *self.name.split("/"))

    @property
    def kind(self) -> str:
        """The variable's own name without numbers and, for the optimizer's, without the name of its weight."""
        own = re.sub(r"(_\d+)+$", "", self.name.rsplit("/", 1)[-1])
        return own.rsplit("_", 1)[-1] if self.group == "optimizer_variables" else own


@dataclass(frozen=True)
class Inventory:
    """The variables of one model.

    Attributes:
        weights: Trainable and non-trainable ones in the order of the layers, which freezing does not change.
        optimizer: The optimizer's; `is_optimizer_built` says whether all of them exist.
        metrics: Those of the metrics that Keras has made so far.
    """

    weights: tuple[VariableRecord, ...]
    optimizer: tuple[VariableRecord, ...]
    metrics: tuple[VariableRecord, ...]
    has_optimizer: bool
    is_optimizer_built: bool


@dataclass(frozen=True)
class Rebuilt:
    """Outcome of a rebuild: an inventory, or the reason why there is none.

    Attributes:
        reason: Why the model could not be rebuilt; empty when it could.
        missing: The error that `load_model` raises unless it is given `custom_objects`; empty when it raises none.
        auto_names: Parts of the weights' paths that Keras makes up by counting the objects of the process.
    """

    inventory: Inventory | None
    reason: str = ""
    missing: str = ""
    auto_names: tuple[str, ...] = ()


def list_variables(model: Model, group: str) -> list[Variable]:
    """Returns the variables of one of `GROUPS`, in the order in which Keras hands their arrays to a training step."""
    if group == "optimizer_variables":
        optimizer = getattr(model, "optimizer", None)
        return [] if optimizer is None else list(optimizer.variables)
    return list(getattr(model, group))


def record_variable(variable: Variable, group: str) -> VariableRecord:
    return VariableRecord(id(variable), group, variable.path, tuple(variable.shape), str(variable.dtype))


def take_inventory(model: Model) -> Inventory:
    trainable = {id(v) for v in model.trainable_variables}
    optimizer = getattr(model, "optimizer", None)
    weights = tuple(record_variable(v, GROUPS[0 if id(v) in trainable else 1]) for v in model.variables)
    return Inventory(
        weights=weights,
        optimizer=tuple(record_variable(v, GROUPS[2]) for v in list_variables(model, GROUPS[2])),
        metrics=tuple(record_variable(v, GROUPS[3]) for v in list_variables(model, GROUPS[3])),
        has_optimizer=optimizer is not None,
        is_optimizer_built=getattr(optimizer, "built", False),
    )


# --- config ----------------------------------------------------------------------------------------------------------


def find_saving_lib() -> ModuleType | None:
    """Returns Keras's private module of the saving format, if this Keras has it."""
    try:
        return importlib.import_module("keras.src.saving.saving_lib")
    except ImportError:
        return None


def find_global_state() -> ModuleType | None:
    """Returns Keras's private module of what it keeps for each thread, if this Keras has it."""
    try:
        return importlib.import_module("keras.src.backend.common.global_state")
    except ImportError:
        return None


def serialize_model(model: Model, saving_lib: ModuleType | None) -> tuple[str | None, str]:
    """Returns the JSON that `load_model` needs, or `None` and the reason; `saving_lib` is `find_saving_lib()`."""
    serialize = getattr(saving_lib, "_serialize_model_as_json", None)
    try:
        # Keras's own calls of what NumPy 2 deprecates are no reason, where the user made errors of warnings.
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            if serialize is not None:
                return serialize(model)[0], ""
            return json.dumps(keras.saving.serialize_keras_object(model)), ""
    except Exception as error:  # noqa: BLE001  # a custom `get_config` may raise anything, which must not cost the save
        return None, _shorten(error)


def deserialize_model(config: str, custom_objects: Mapping[str, Any], saving_lib: ModuleType | None) -> Model:
    """Makes the model of a config that this process wrote: not in safe mode, since it is its own code."""
    deserialize = getattr(saving_lib, "_model_from_config", None)
    if deserialize is not None:
        return deserialize(config, custom_objects=dict(custom_objects), compile=True, safe_mode=False)
    return keras.saving.deserialize_keras_object(json.loads(config), dict(custom_objects), safe_mode=False)


def _shorten(error: Exception) -> str:
    # Keras wraps the error of an inner layer into that of each outer one, with the whole config before it.
    innermost = str(error).rsplit("Exception encountered:", 1)[-1].split("Full object config:", 1)[0]
    text = " ".join(f"{type(error).__name__}: {innermost}".split()).rstrip(".")
    return text if len(text) <= 300 else f"{text[:300]}..."


# --- rebuild ---------------------------------------------------------------------------------------------------------


def rebuild_inventory(model: Model, config: str) -> Rebuilt:
    """Returns the variables that `load_model` makes of `config` in a fresh process, without allocating them.

    Runs the constructors of the model's layers again, in a thread of its own.
    """
    custom_objects = find_custom_objects(model)
    attempts: list[tuple[str, Mapping[str, Any]]] = [
        (config, {}),
        (config, custom_objects),
        (_keep_optimizer_only(config), custom_objects),
    ]
    errors = []
    for is_traced in (True, False) if _state_bytes(model) <= EAGER_REBUILD_BYTES else (True,):
        for number, (text, objects) in enumerate(attempts):
            try:
                inventory, auto_names = _rebuild_as_fresh_process(text, objects, is_traced)
            except Exception as error:  # noqa: BLE001  # custom layers may raise anything, which must not cost the save
                errors.append(_shorten(error))
            else:
                return Rebuilt(inventory, missing=errors[0] if number else "", auto_names=auto_names)
    return Rebuilt(None, reason=errors[len(attempts) - 1])


def _state_bytes(model: Model) -> int:
    variables = [v for group in GROUPS for v in list_variables(model, group)]
    return sum(math.prod(v.shape) * jax.numpy.dtype(v.dtype).itemsize for v in variables)


def _keep_optimizer_only(config: str) -> str:
    """Drops losses and metrics: they name no weight, and may be functions that nobody registered."""
    data = json.loads(config)
    optimizer = (data.get("compile_config") or {}).get("optimizer")
    data["compile_config"] = {"optimizer": optimizer} if optimizer else None
    return json.dumps(data)


def _rebuild_as_fresh_process(
    config: str, custom_objects: Mapping[str, Any], is_traced: bool
) -> tuple[Inventory, tuple[str, ...]]:
    policy = keras.config.dtype_policy()
    keras.backend.get_uid("offstep_probe")

    def rebuild() -> tuple[Inventory, tuple[str, ...]]:
        if keras.backend.get_uid("offstep_probe") != 1:
            raise RuntimeError("this Keras counts names for all threads together")
        keras.config.set_dtype_policy(policy)
        inventory = _take_rebuilt_inventory(
            lambda: deserialize_model(config, custom_objects, find_saving_lib()), is_traced
        )
        return inventory, _find_auto_names(inventory.weights)

    # Keras keeps name counters, name scopes and the distribution per thread: a new thread starts as a process does.
    with (
        _random_state_kept(),
        warnings.catch_warnings(action="ignore"),
        ThreadPoolExecutor(1, thread_name_prefix="offstep-rebuild") as pool,
    ):
        return pool.submit(rebuild).result()


def _take_rebuilt_inventory(build: Callable[[], Model], is_traced: bool) -> Inventory:
    inventories = []

    def run() -> tuple[()]:
        inventories.append(take_inventory(build()))
        return ()

    if keras.backend.backend() != "jax":
        with keras.device(_find_device(is_traced)):
            run()
    elif is_traced:
        jax.eval_shape(run)  # the variables hold tracers: no memory, no computation
    else:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            run()
    return inventories[0]


def _find_device(is_traced: bool) -> str:
    """Returns where to rebuild a model when Keras does not run on JAX."""
    if not is_traced:
        return "cpu"
    if keras.backend.backend() != "torch":
        raise NotImplementedError(f"Keras on {keras.backend.backend()} rebuilds a model only with its arrays")
    return "meta"  # shapes without memory


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Undoes what initializers and seed generators draw from the global generators when they are made."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _find_auto_names(weights: Iterable[VariableRecord]) -> tuple[str, ...]:
    # A seed generator that starts afresh does not change what the model knows: not worth a word to the user.
    parts = [part for v in weights if v.kind != "seed_generator_state" for part in v.path[1:]]
    stems = {part: re.sub(r"_\d+$", "", part) for part in parts}
    # `get_uid` counts once more, then returns the count: only to be called in the thread of a rebuild.
    counted = {stem for stem in set(stems.values()) if keras.backend.get_uid(stem) > 1}
    return tuple(part for part, stem in stems.items() if stem in counted)


def find_custom_objects(model: Model) -> dict[str, Any]:  # classes and functions
    """Finds the classes and functions that the model is made of and that are not Keras's, by their names in configs."""
    optimizer = getattr(model, "optimizer", None)
    owners = [*list_layers(model), optimizer, getattr(optimizer, "inner_optimizer", None)]
    found: dict[str, Any] = {}
    for owner in owners:
        for value in (owner, *getattr(owner, "__dict__", {}).values()):
            used = value if inspect.isfunction(value) else type(value)
            if (used is value or hasattr(used, "get_config")) and not used.__module__.startswith("keras."):
                found[keras.saving.get_registered_name(used)] = used
    return found


def list_layers(model: Model) -> list[Any]:  # of keras.Layer
    if hasattr(model, "_flatten_layers"):
        return list(model._flatten_layers())
    return [model, *(inner for layer in getattr(model, "layers", ()) for inner in list_layers(layer))]


# --- assets ----------------------------------------------------------------------------------------------------------


def collect_assets(model: Model, saving_lib: ModuleType | None) -> dict[str, bytes]:
    """Returns the files of the model's layers, by their paths; `saving_lib` is `find_saving_lib()`."""
    collect = getattr(saving_lib, "_save_assets_to_dict", None)
    if collect is None:
        return _extract_assets(model)
    with _distribution_off():
        return _flatten_assets(collect(model) or {})


@contextmanager
def _distribution_off() -> Iterator[None]:
    """Keras makes an optimizer to see which attributes are its own; spread over processes, that takes collectives."""
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)


def _flatten_assets(tree: Mapping[str, Any], prefix: str = "") -> dict[str, bytes]:  # dicts and uint8 arrays
    files: dict[str, bytes] = {}
    for name, value in tree.items():
        path = prefix + name
        files |= _flatten_assets(value, f"{path}/") if isinstance(value, dict) else {path: bytes(value)}
    return files


def _extract_assets(model: Model) -> dict[str, bytes]:
    """Takes the assets out of a whole `.keras` file, which is written only if a layer has any."""
    if not any(hasattr(layer, "save_assets") for layer in list_layers(model)):
        return {}
    with tempfile.TemporaryDirectory() as directory:
        archive_path = Path(directory) / "model.keras"
        keras.saving.save_model(model, archive_path)
        with zipfile.ZipFile(archive_path) as archive:
            names = [name for name in archive.namelist() if name.startswith("assets/") and not name.endswith("/")]
            return {name.removeprefix("assets/"): archive.read(name) for name in names}
