"""What a Keras model's state consists of in each format: the leaves, and all else that the engine has to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from offstep import keras_files, keras_names, keras_state
from offstep.arrays import Array, describe_leaf
from offstep.formats.hdf5_checked import add_checksums
from offstep.keras_files import FilePlan
from offstep.keras_rebuild import Model
from offstep.records import Leaf, PathKey
from offstep.rendering import Rendering

DIRECTORY, WEIGHTS, ARCHIVE, LEGACY = "orbax_directory", "keras_weights", "keras_archive", "keras_legacy"
_RENDERED = "whole_file"


@dataclass(frozen=True)
class Form:
    """A model's state in one format.

    Attributes:
        format: Key of `formats.FORMATS`.
        leaves: In the order of the slot.
        order: Which live array each leaf is.
        iteration_index: Which leaf is the optimizer's counter of batches; `None` without an optimizer.
        empty_nodes: Groups without any array, each with the Orbax name of its type.
        documents: What the format's `prepare` wants, as JSON.
        rendering: How the trainer makes a file that the writer cannot make.
        notes: Sentences that the user must be told once.
    """

    format: str
    leaves: tuple[Leaf, ...]
    order: tuple[int, ...]
    iteration_index: int | None
    empty_nodes: tuple[tuple[tuple[PathKey, ...], str], ...] = ()
    documents: dict[str, Any] | None = None  # JSON
    rendering: Rendering | None = None
    notes: tuple[str, ...] = ()


def describe_form(
    model: Model,
    arrays: Sequence[Array],
    format: str,  # noqa: A002  the word that records and formats use
    *,
    weights_only: bool = False,
    skip_unchanged: bool = False,
    hdf5_checksums: bool = False,
) -> Form:
    """Describes `model`'s state, whose live arrays are `arrays`.

    On the thread that trains; within `fit` it synchronises the model.

    Args:
        format: `DIRECTORY`, `WEIGHTS`, `ARCHIVE` or `LEGACY`.
        weights_only: For a directory: `arrays` are those without optimizer and metrics. Files hold what stock Keras
            puts into them.
        skip_unchanged: For a directory: weights that are not trainable are expected to stay as they are.
        hdf5_checksums: For `WEIGHTS`: arrays have the checksums that HDF5 itself verifies.
    """
    if format == DIRECTORY:
        frozen = _find_frozen(model) if skip_unchanged else range(0)
        return _describe_directory(model, arrays, weights_only, frozen)
    return _describe_file(model, arrays, format, hdf5_checksums=hdf5_checksums and format == WEIGHTS)


def _find_frozen(model: Model) -> range:
    first = len(model.trainable_variables)
    return range(first, first + len(model.non_trainable_variables))


def _describe_directory(model: Model, arrays: Sequence[Array], weights_only: bool, frozen: range) -> Form:
    state = keras_names.describe_state(model, weights_only=weights_only)
    leaves = [describe_leaf(path, array) for path, array in zip(state.paths, arrays, strict=True)]
    documents = None
    if state.config is not None:
        documents = {"config": state.config, "assets": {name: data.hex() for name, data in state.assets.items()}}
    return Form(
        format=DIRECTORY,
        leaves=tuple(replace(leaf, is_frozen=index in frozen) for index, leaf in enumerate(leaves)),
        order=tuple(range(len(arrays))),
        iteration_index=state.iteration_index,
        empty_nodes=state.empty_nodes,
        documents=documents,
        notes=state.notes,
    )


def _describe_file(
    model: Model,
    arrays: Sequence[Array],
    format: str,  # noqa: A002
    *,
    hdf5_checksums: bool,
) -> Form:
    plan, documents = _plan_file(model, format)
    paths: list[tuple[PathKey, ...]] = [tuple(path.split("/")) for path in plan.sources]
    order = list(plan.sources.values())
    # The rest goes into the slot too: Keras needs all of it, should it have to write the file after all.
    left_out = sorted(set(range(len(arrays))) - set(order))
    order += left_out
    paths += [()] * len(left_out)
    leaves = [describe_leaf(path, arrays[number]) for path, number in zip(paths, order, strict=True)]
    counter = keras_state.find_iteration(model)

    def render(taken: Sequence[np.ndarray]) -> bytes:
        content = keras_files.render_file(model, format, _by_number(order, taken))
        return add_checksums(content) if hdf5_checksums else content

    def find_difference(taken: Sequence[np.ndarray]) -> str:
        return keras_files.find_difference(model, plan, _by_number(order, taken))

    rate = keras_state.find_learning_rate(model)
    if documents is not None and hdf5_checksums:
        documents |= {"hdf5_checksums": True}
    if documents is not None and rate is not None:
        documents |= {"learning_rate": order.index(rate)}
    return Form(
        format=_RENDERED if plan.reason else format,
        leaves=tuple(leaves),
        order=tuple(order),
        iteration_index=None if counter is None else order.index(counter),
        documents=documents,
        rendering=Rendering(render, None if plan.reason else find_difference),
        notes=(_note_rendered(plan.reason),) if plan.reason else (),
    )


def _plan_file(model: Model, format: str) -> tuple[FilePlan, dict[str, Any] | None]:  # noqa: A002  JSON
    if format == LEGACY:
        return FilePlan({}, {}, "this is Keras's legacy format"), None
    plan = keras_files.plan_file(model)
    documents: dict[str, Any] | None = {"groups": plan.groups}
    if format == ARCHIVE and not plan.reason:
        keras_state.attach_values(model)  # an optimizer's config holds the value of its learning rate
        archive = keras_files.describe_archive(model)
        if archive is None:
            return FilePlan({}, {}, "Keras cannot serialise this model"), None
        documents = {"groups": plan.groups} | archive
    return plan, None if plan.reason else documents


def _by_number(order: Sequence[int], taken: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns the arrays in the order of the live ones; some are taken twice."""
    found = dict(zip(order, taken, strict=True))
    return [found[number] for number in range(len(found))]


def _note_rendered(reason: str) -> str:
    return f"Keras itself writes each file, on a thread beside fit, which slows training a little: {reason}."
