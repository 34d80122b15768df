"""What the leaves of a Keras model's state are called in a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import keras

from offstep.keras_rebuild import (
    GROUPS,
    Inventory,
    Rebuilt,
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
from offstep.keras_state import WEIGHT_GROUPS, Model, attach_values, find_iteration, saved_groups

StatePath = tuple[str, ...]
Alias = tuple[int, StatePath]


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


def describe_state(model: Model, *, weights_only: bool = False) -> KerasState:
    """Names the leaves of `model`'s state, in the order of `live_arrays`, and collects its config and assets.

    Serialises the model and rebuilds it without its arrays: about a millisecond per variable, for a `Sequential` as
    long as `load_model` takes. That runs the constructors of custom layers once more. On the thread that trains;
    within `fit` it synchronises the model.

    Raises:
        ValueError: two variables have the same path, where stock Keras raises it too.
    """
    live = [record_variable(v, group) for group in saved_groups(weights_only) for v in list_variables(model, group)]
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
