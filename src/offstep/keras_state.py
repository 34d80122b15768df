"""What the leaves of a Keras model's state are called in a checkpoint, and where their live arrays are.

With `keras_rebuild`, the only modules that touch private parts of Keras; each such part has a public way beside it.

Where Keras runs on TensorFlow or PyTorch the live arrays are copies in host memory: the next step changes the variables
in place.
"""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from offstep.keras_rebuild import (
    GROUPS,
    Inventory,
    Rebuilt,
    Variable,
    VariableRecord,
    collect_assets,
    find_saving_lib,
    list_layers,
    list_variables,
    rebuild_inventory,
    record_variable,
    serialize_model,
    take_inventory,
)

Model = Any  # Keras carries no types
Array = Any  # jax.Array; np.ndarray where Keras runs on another backend
StatePath = tuple[str, ...]
Alias = tuple[int, StatePath]

WEIGHT_GROUPS = GROUPS[:2]


@dataclass(frozen=True)
class KerasState:
    """The names of a model's state, and what else a checkpoint of the model holds.

    Attributes:
        paths: One per live array, in the order of `live_arrays`, e.g. `("trainable_variables", "dense", "kernel")`.
            Unique, and none is the beginning of another. They are the names that the model has after
            `keras.saving.load_model` rebuilt it in a fresh process, which is where that function looks for them;
            with `weights_only`, or when the model cannot be rebuilt, those of the live model.
        empty_nodes: Groups without any array, each with the Orbax name of its type.
        config: The JSON that `keras.saving.load_model` rebuilds the model from; `None` with `weights_only` or when
            Keras cannot serialise the model.
        assets: Files of layers with assets, e.g. `"layers/string_lookup/vocabulary.txt"`.
        iteration_index: Which live array is the optimizer's counter of batches; `None` without an optimizer. It
            counts every batch, also where `optimizer.iterations` counts accumulated gradients once.
        aliases: More names under which `model.load_weights` of this model, or of one made by the same code, looks for
            an array. Empty when not needed, or when they would contradict `paths`.
        notes: Sentences that the user must be told once.
    """

    paths: tuple[StatePath, ...]
    empty_nodes: tuple[tuple[StatePath, str], ...] = ()
    config: str | None = None
    assets: Mapping[str, bytes] = field(default_factory=dict)
    iteration_index: int | None = None
    aliases: tuple[Alias, ...] = ()
    notes: tuple[str, ...] = ()


# --- the live arrays -------------------------------------------------------------------------------------------------


def live_arrays(model: Model, *, weights_only: bool = False) -> list[Array]:
    """Returns the arrays of `model`'s state: trainable, non-trainable, optimizer's, metrics'.

    The arrays are those that the next training step will donate: use them before it starts, on the thread that
    trains. Within `fit` this does not synchronise the model with its training state.

    Raises:
        RuntimeError: a variable has no value, since the model is not built or a training step failed.
    """
    return live_state(model, weights_only=weights_only)[0]


def state_signature(model: Model, weights_only: bool = False) -> object:
    """Returns a value that changes when the names or the number of `model`'s live arrays may have changed.

    That is when the model is compiled again or variables are added, removed, frozen or unfrozen. Shapes and dtypes of
    the arrays are not part of it.
    """
    return live_state(model, weights_only=weights_only)[1]


def live_state(model: Model, *, weights_only: bool = False, as_trained: bool = False) -> tuple[list[Array], object]:
    """Returns `live_arrays` and `state_signature` for the price of one.

    With `as_trained`, what other callbacks did to the model since the last training step of `fit` is left out.
    """
    groups = _live_groups(model, _saved_groups(weights_only), as_trained)
    # `compile` makes a new loss tracker; with it, the other metrics and their names may be new too.
    compiled = getattr(model, "_loss_tracker", None) or getattr(model, "train_function", None)
    owners = (model, getattr(model, "optimizer", None), compiled)
    # Weak, so that the signature neither keeps a model alive nor takes a new object for a dead one at its address.
    references = tuple(weakref.ref(owner) if owner is not None else None for owner in owners)
    signature = (*references, *map(len, groups))
    return [array for group in groups for array in group], signature


def _saved_groups(weights_only: bool) -> tuple[str, ...]:
    return WEIGHT_GROUPS if weights_only else GROUPS


def is_detached(model: Model) -> bool:
    """Returns whether the state is outside of the model's variables, as it is between two steps of `fit`."""
    return not getattr(model, "_jax_state_synced", True) and bool(getattr(model, "_jax_state", None))


def is_in_fit(model: Model) -> bool:
    """Returns whether Keras's `fit` called the caller, rather than a loop that drives model and callbacks by hand."""
    fit = getattr(inspect.unwrap(keras.Model.fit), "__code__", None)
    frame = inspect.currentframe()
    while frame is not None and not (frame.f_code is fit and frame.f_locals.get("self") is model):
        frame = frame.f_back
    return frame is not None


def last_step_id(model: Model) -> int | None:
    """Returns what differs before and after a training step; `None` when this Keras does not tell."""
    if keras.backend.backend() != "jax":
        return read_iterations(model)
    state = getattr(model, "_jax_state", None)
    return None if state is None else id(state)  # the next one is made while this one still exists


def read_iterations(model: Model, *, as_trained: bool = False) -> int | None:
    """Returns the optimizer's counter of batches; waits until the step that makes it is computed."""
    counter = _find_counter(model)
    if keras.backend.backend() != "jax":
        return None if counter is None else int(keras.ops.convert_to_numpy(counter))
    variables = list_variables(model, GROUPS[2])
    index = next((i for i, v in enumerate(variables) if v is counter), None)
    return None if index is None else int(_live_groups(model, (GROUPS[2],), as_trained)[0][index])


def _live_groups(model: Model, groups: Sequence[str], as_trained: bool = False) -> list[list[Array]]:
    # Within `fit` Keras takes the values out of the variables, and keeps them in `_jax_state` between two steps.
    detached: Mapping[str, list[Array]] = {}
    if not hasattr(model, "_jax_state"):
        attach_values(model)
    elif as_trained or is_detached(model):
        detached = model._jax_state or {}
    variables = [list_variables(model, group) for group in groups]
    if as_trained and [len(group) for group in variables] != [len(detached.get(group, ())) for group in groups]:
        detached = {}  # compiled or frozen anew since then
    return [
        detached[group] if group in detached else _values(own) for group, own in zip(groups, variables, strict=True)
    ]


def attach_values(model: Model) -> None:
    """Makes the variables hold their current values."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


def _values(variables: Iterable[Variable]) -> list[Array]:
    if keras.backend.backend() != "jax":
        return [keras.ops.convert_to_numpy(variable) for variable in variables]
    # `value` costs twenty times as much as `_value`.
    return [value if (value := getattr(v, "_value", None)) is not None else _public_value(v) for v in variables]


def value_of(variable: Variable) -> Array:
    """Returns the array that a variable holds.

    Raises:
        RuntimeError: it has none.
    """
    return _values([variable])[0]


def _public_value(variable: Variable) -> Array:
    try:
        value: Array | None = variable.value
    except TypeError:  # Keras calls the variable's initializer, which it has dropped
        value = None
    if value is None:
        raise RuntimeError(
            f"{variable.path}: the variable has no value; was a training step interrupted, or is the model not built?"
        )
    return value


# --- the names -------------------------------------------------------------------------------------------------------


def describe_state(model: Model, *, weights_only: bool = False) -> KerasState:
    """Names the leaves of `model`'s state, in the order of `live_arrays`, and collects its config and assets.

    Serialises the model and rebuilds it without its arrays: about a millisecond per variable, for a `Sequential` as
    long as `load_model` takes. That runs the constructors of custom layers once more. On the thread that trains;
    within `fit` it synchronises the model.

    Raises:
        ValueError: two variables have the same path, where stock Keras raises it too.
    """
    live = [record_variable(v, group) for group in _saved_groups(weights_only) for v in list_variables(model, group)]
    if weights_only:
        paths = tuple(v.path for v in live)
        _check_paths(paths)
        return KerasState(paths, _find_empty_nodes(paths, WEIGHT_GROUPS))
    attach_values(model)  # an optimizer's config holds the value of its learning rate
    saving_lib = find_saving_lib()
    config, reason = serialize_model(model, saving_lib)
    rebuilt = Rebuilt(None, reason) if config is None else rebuild_inventory(model, config)
    paths, notes = _choose_paths(live, take_inventory(model), rebuilt)
    _check_paths(paths)
    aliases, clash_notes = _find_aliases([v.path for v in live], paths)
    return KerasState(
        paths=paths,
        empty_nodes=_find_empty_nodes(paths, GROUPS),
        config=config,
        assets=collect_assets(model, saving_lib),
        iteration_index=find_iteration(model),
        aliases=aliases,
        notes=(*notes, *clash_notes, *_note_adapted(model)),
    )


def _find_empty_nodes(paths: Iterable[StatePath], groups: Iterable[str]) -> tuple[tuple[StatePath, str], ...]:
    filled = {path[0] for path in paths}
    return tuple(((group,), "Dict") for group in groups if group not in filled)


def find_iteration(model: Model) -> int | None:
    """Returns which of the live arrays is the optimizer's counter of batches; `None` without an optimizer."""
    counter = _find_counter(model)
    live = [variable for group in GROUPS for variable in list_variables(model, group)]
    return next((i for i, variable in enumerate(live) if variable is counter), None)


def find_learning_rate(model: Model) -> int | None:
    """Returns which of the live arrays is the learning rate; `None` where a schedule computes it."""
    rate = getattr(_innermost_optimizer(model), "learning_rate", None)
    live = [variable for group in GROUPS for variable in list_variables(model, group)]
    return next((i for i, variable in enumerate(live) if variable is rate), None)


def _find_counter(model: Model) -> Variable | None:
    # `optimizer.iterations` may be computed (gradient accumulation), so look for the variable behind it.
    return next((v for v in getattr(_innermost_optimizer(model), "variables", ()) if v.name == "iteration"), None)


def _innermost_optimizer(model: Model) -> Any:  # of Keras, or None
    optimizer = getattr(model, "optimizer", None)
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer  # type: ignore[union-attr]  # hasattr does not narrow
    return optimizer


def batches_per_iteration(model: Model) -> int:
    """Returns how many batches `optimizer.iterations` counts as one."""
    return getattr(_innermost_optimizer(model), "gradient_accumulation_steps", None) or 1


def skips_steps(model: Model) -> bool:
    """Returns whether the optimizer may leave batches uncounted, as loss scaling does when gradients overflow."""
    return hasattr(getattr(model, "optimizer", None), "inner_optimizer")


def _choose_paths(
    live: Sequence[VariableRecord], inventory: Inventory, rebuilt: Rebuilt
) -> tuple[tuple[StatePath, ...], list[str]]:
    """Returns a path for each variable of `live`, which holds those of `inventory` in the order of their arrays."""
    metrics = _name_metrics(inventory.metrics)
    target, reason = rebuilt.inventory, rebuilt.reason
    if target is not None:
        reason = _find_difference(inventory.weights, target.weights) or _find_flaw(target)
    if target is None or reason:
        return tuple(metrics.get(v.key, v.path) for v in live), [_note_unloadable(reason)]
    # By identity: what is trainable here may not be so in the rebuilt model, and then belongs to another group there.
    names = {old.key: new.path for old, new in zip(inventory.weights, target.weights, strict=True)}
    optimizer, notes = _name_optimizer(inventory, target)
    names |= optimizer | metrics
    return tuple(names.get(v.key, v.path) for v in live), [*_note_conditions(rebuilt), *notes]


def _find_difference(live: Sequence[VariableRecord], rebuilt: Sequence[VariableRecord]) -> str:
    if len(live) != len(rebuilt):
        return f"it has {len(live)} variables, but {len(rebuilt)} after it was rebuilt from its config"
    for old, new in zip(live, rebuilt, strict=True):
        if (old.shape, old.dtype, old.kind) != (new.shape, new.dtype, new.kind):
            return (
                f"{old.name} is {old.dtype}{list(old.shape)}; rebuilt from the config, "
                f"{new.name} is in its place, {new.dtype}{list(new.shape)}"
            )
    return ""


def _find_flaw(rebuilt: Inventory) -> str:
    """Returns what makes stock `load_model` fail after it rebuilt the model."""
    if not rebuilt.has_optimizer:
        return "rebuilt from its config, it has no optimizer, and load_model needs one"
    conflict = _find_conflict([v.path for v in (*rebuilt.weights, *rebuilt.optimizer, *rebuilt.metrics)])
    return "" if conflict is None else f"rebuilt from its config, it has several variables {'/'.join(conflict[1:])}"


def _name_optimizer(live: Inventory, rebuilt: Inventory) -> tuple[dict[int, StatePath], list[str]]:
    if not live.is_optimizer_built:  # it has only variables that are named after the optimizer
        return {}, []
    reason = _find_difference(live.optimizer, rebuilt.optimizer)
    if reason:
        return {}, [f"keras.saving.load_model does not restore the optimizer's state of this model: {reason}."]
    return {old.key: new.path for old, new in zip(live.optimizer, rebuilt.optimizer, strict=True)}, []


def _name_metrics(live: Sequence[VariableRecord]) -> dict[int, StatePath]:
    """Makes the live paths of metrics unique: `load_model` does not meet those that Keras makes in the first batch."""
    seen: Counter[StatePath] = Counter()
    names = {}
    for variable in live:
        seen[variable.path] += 1
        count = seen[variable.path]
        *parents, last = variable.path
        names[variable.key] = variable.path if count == 1 else (*parents, f"{last}__{count}")
    return names


def _find_conflict(paths: Sequence[StatePath]) -> StatePath | None:
    """Returns a path that occurs twice, or in which another one lies."""
    leaves = set(paths)
    # Orbax joins the keys by dots, so it is there that names must differ.
    counts = Counter(".".join(path) for path in paths)
    for path in paths:
        if counts[".".join(path)] > 1:
            return path
        for end in range(1, len(path)):
            if path[:end] in leaves:
                return path[:end]
    return None


def _check_paths(paths: Sequence[StatePath]) -> None:
    conflict = _find_conflict(paths)
    if conflict is not None:
        raise ValueError(
            f"{'/'.join(conflict)}: several variables of the model have this path, expected one; "
            f"give unique names to the layers and optimizers that it is made of"
        )


def _find_aliases(live: Sequence[StatePath], paths: Sequence[StatePath]) -> tuple[tuple[Alias, ...], list[str]]:
    """Returns the live names that are free; none when a weight's live name is that of another one in `paths`."""
    taken = set(paths)
    # Metrics start from zero in every epoch: nobody misses them.
    renamed = [(i, path) for i, path in enumerate(live) if path != paths[i] and path[0] != "metrics_variables"]
    # Seeds do not count: for a random generator, the state of another one is as good.
    clashes = [path for _, path in renamed if path in taken and path[-1] != "seed_generator_state"]
    if clashes:
        return (), [_note_clash(clashes[0])]
    aliases = tuple((i, path) for i, path in renamed if path not in taken)
    return (() if _find_conflict([*paths, *(path for _, path in aliases)]) else aliases), []


# --- the notes -------------------------------------------------------------------------------------------------------


def _note_unloadable(reason: str) -> str:
    return (
        f"keras.saving.load_model cannot rebuild this model: {reason}. The state is saved under the live model's own "
        f"paths: build the model in code and use load_weights."
    )


def _note_conditions(rebuilt: Rebuilt) -> list[str]:
    """Says what must hold for `load_model` to find the paths of a model that can be rebuilt."""
    notes = []
    if rebuilt.missing:
        notes.append(
            f"keras.saving.load_model needs custom_objects for this model, or its classes and functions registered "
            f"with @keras.saving.register_keras_serializable(): {rebuilt.missing}."
        )
    if rebuilt.auto_names:
        names = ", ".join(rebuilt.auto_names[:3])
        notes.append(
            f"Keras itself numbers some parts of this model ({names}): keras.saving.load_model restores them only in "
            f"a process that made no other layers, or after keras.utils.clear_session(). Names given in code lift this."
        )
    return notes


def _note_clash(path: StatePath) -> str:
    return (
        f"Restore this checkpoint with keras.saving.load_model, not with load_weights: "
        f"{'/'.join(path)} is the name of one variable in this process, and of another one in a fresh process."
    )


def print_message(text: str) -> None:
    """Prints a line as Keras's callbacks do: to the terminal, or to the log where the user turned that off."""
    try:
        from keras.src.utils.io_utils import print_msg
    except ImportError:
        print_msg = print
    print_msg(text)


def _note_adapted(model: Model) -> list[str]:
    # Keras 3.15 restores the variables of a directory without the layer's `load_own_variables`, which would do this.
    adapted = [
        layer.name
        for layer in list_layers(model)
        if isinstance(layer, keras.layers.Normalization) and layer.input_mean is None
    ]
    if not adapted:
        return []
    return [
        f"After keras.saving.load_model, call finalize_state() on the adapted layers of this model "
        f"({', '.join(adapted)}): Keras restores their statistics, but does not use them before that."
    ]
