"""A Keras model as a target of a restore: which leaves it has, and how an array becomes the value of one."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from offstep import keras_names, keras_state
from offstep.errors import StructureMismatch
from offstep.keras_files import plan_file
from offstep.keras_rebuild import GROUPS, list_layers, list_variables
from offstep.matching import OPTIMIZER_GROUP, WEIGHT_GROUPS, TargetLeaf, is_forgivable
from offstep.matching import Path as LeafPath
from offstep.placement import (
    Array,
    Destination,
    can_be_overwritten,
    describe_destination,
    open_memory,
    renew,
)
from offstep.stored import Contents, Reader, StoredLeaf

Model = Any  # Keras carries no types
Variable = Any  # nor has it one class of variables for all its modes


@dataclass(frozen=True)
class ModelTarget:
    """The places of a built model.

    Attributes:
        model: The model.
        leaves: In the order in which a checkpoint of the model holds them.
        variables: The variable behind each.
        find_names: Gives the paths that a checkpoint of ours has for the leaves; about a millisecond for each.
    """

    model: Model
    leaves: tuple[TargetLeaf, ...]
    variables: tuple[Variable, ...]
    find_names: Callable[[], Sequence[LeafPath]]

    def describe(self, number: int) -> Destination:
        """Returns how to make the array of one leaf."""
        return describe_destination(keras_state.value_of(self.variables[number]))

    def open_memory(self, number: int) -> np.ndarray | None:
        """Returns the memory of one leaf's value for writing, where nobody else has it; it must be filled at once."""
        variable = self.variables[number]
        if not _is_sole_owner(variable) or not can_be_overwritten(variable._value):
            return None
        renewed = renew(variable._value)
        _assign(variable, renewed)
        return open_memory(renewed)

    def assign(self, number: int, array: Array) -> None:
        """Makes an array of the right shape and dtype the value of one leaf; the old one is let go."""
        _assign(self.variables[number], array)

    def finish(self) -> None:
        """Lets layers work out what they keep beside their variables."""
        for layer in list_layers(self.model):
            if hasattr(layer, "finalize_state") and getattr(layer, "input_mean", True) is None:
                layer.finalize_state()  # `Normalization`, adapted before it was saved


def open_model(model: Model, contents: Contents) -> ModelTarget:
    """Lists the places of a model; builds its optimizer where the checkpoint has that one's state.

    On the thread that trains; within `fit` it synchronises the model with its training state.

    Raises:
        StructureMismatch: the model has no variables yet.
    """
    if not getattr(model, "built", False):
        raise StructureMismatch(
            f"model {model.name!r} is not built, so it has no variables to restore into; call it once, or build() it"
        )
    keras_state.attach_values(model)
    optimizer = getattr(model, "optimizer", None)
    saved = sum(leaf.path[0] in (OPTIMIZER_GROUP, "optimizer") for leaf in contents.leaves)
    # One that has not trained yet has its counter and its learning rate only, here as in a checkpoint.
    if optimizer is not None and not optimizer.built and saved > len(optimizer.variables):
        optimizer.build(model.trainable_variables)
    variables = [(v, group) for group in GROUPS for v in list_variables(model, group)]
    leaves = tuple(_describe(variable, group) for variable, group in variables)
    return ModelTarget(model, leaves, tuple(v for v, _ in variables), lambda: keras_names.describe_state(model).paths)


def name_leaves(target: ModelTarget, contents: Contents) -> tuple[list[tuple[LeafPath, StoredLeaf]], str]:
    """Returns the leaves of a checkpoint with the paths that a state of the model gives them.

    The text says why that cannot be told of a Keras file: a layer of the model computes what it saves.
    """
    if contents.format in ("orbax_directory", "keras_legacy"):
        reason = (
            "" if contents.format == "orbax_directory" else "it has Keras's legacy format, of which it takes weights"
        )
        return [(leaf.path, leaf) for leaf in contents.leaves], reason
    plan = plan_file(target.model)
    numbers = {tuple(name.split("/")): number for name, number in plan.sources.items()}
    named = [(leaf.path, numbers.get(tuple(map(str, leaf.path)))) for leaf in contents.leaves]
    paths = [path if number is None else target.leaves[number].path for path, number in named]
    return list(zip(paths, contents.leaves, strict=True)), plan.reason


def load_by_keras(target: ModelTarget, reader: Reader) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Lets stock Keras load one of its files; returns the names of the leaves that such a file has, and of the others.

    Raises:
        StructureMismatch: Keras finds other layers in it, or other shapes; the model may have been changed.
    """
    is_legacy = reader.contents.format == "keras_legacy"
    with _named_for_keras(reader.file, is_legacy=is_legacy) as path:
        try:
            target.model.load_weights(path)
        except (ValueError, KeyError) as error:
            raise StructureMismatch(f"stock Keras cannot load {reader.path} into this model: {error}") from error
    groups = WEIGHT_GROUPS if is_legacy else GROUPS
    restored = [leaf.name for leaf in target.leaves if leaf.path[0] in groups and not is_forgivable(leaf.path)]
    return tuple(restored), tuple(leaf.name for leaf in target.leaves if leaf.name not in set(restored))


@contextmanager
def _named_for_keras(path: Path, *, is_legacy: bool) -> Iterator[Path]:
    """Gives a legacy file a name by which Keras knows it, where it has that of another format."""
    if not is_legacy or not path.name.endswith(".weights.h5"):
        yield path
        return
    with tempfile.TemporaryDirectory() as directory:
        link = Path(directory, "model.h5")
        link.symlink_to(path.absolute())
        yield link


def _describe(variable: Variable, group: str) -> TargetLeaf:
    return TargetLeaf((group, *variable.path.split("/")), tuple(variable.shape), _dtype_name(variable))


def _dtype_name(variable: Variable) -> str:
    name: str = getattr(variable, "_dtype", None) or variable.dtype  # the public one depends on the scope
    return str(name)


def _count_references(owner: Any) -> int:  # a variable
    value = vars(owner)["_value"]
    return sys.getrefcount(value)


_SOLE_REFERENCES = _count_references(SimpleNamespace(_value=object()))


def _is_sole_owner(variable: Variable) -> bool:
    """Returns whether nothing but the variable refers to its value, which may then be given up."""
    return "_value" in getattr(variable, "__dict__", {}) and _count_references(variable) == _SOLE_REFERENCES


def _assign(variable: Variable, array: Array) -> None:
    direct = getattr(variable, "_direct_assign", None)
    if direct is None:
        variable.assign(array)
    else:
        direct(array)
