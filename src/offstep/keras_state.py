"""Where the live arrays of a Keras model are, and what its optimizer counts.

With `keras_rebuild`, the only modules that touch private parts of Keras; each such part has a public way beside it.

Where Keras runs on TensorFlow or PyTorch the live arrays are copies in host memory: the next step changes the variables
in place.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras

from offstep.keras_rebuild import GROUPS, Variable, list_variables

Model = Any  # Keras carries no types
Array = Any  # jax.Array; np.ndarray where Keras runs on another backend

WEIGHT_GROUPS = GROUPS[:2]


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
    groups = _live_groups(model, saved_groups(weights_only), as_trained)
    # `compile` makes a new loss tracker; with it, the other metrics and their names may be new too.
    compiled = getattr(model, "_loss_tracker", None) or getattr(model, "train_function", None)
    owners = (model, getattr(model, "optimizer", None), compiled)
    # Weak, so that the signature neither keeps a model alive nor takes a new object for a dead one at its address.
    references = tuple(weakref.ref(owner) if owner is not None else None for owner in owners)
    signature = (*references, *map(len, groups))
    return [array for group in groups for array in group], signature


def saved_groups(weights_only: bool) -> tuple[str, ...]:
    """Returns the groups of variables that are saved."""
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
    elif is_detached(model) or (as_trained and model._jax_state and _still_fits(model, groups)):
        detached = model._jax_state
    # Keras finds the variables anew each time, which for many layers takes longer than the snapshot.
    return [detached[group] if group in detached else _values(list_variables(model, group)) for group in groups]


def _still_fits(model: Model, groups: Sequence[str]) -> bool:
    """Returns whether the model has not been compiled or frozen anew since its last training step."""
    return all(len(list_variables(model, group)) == len(model._jax_state.get(group, ())) for group in groups)


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


# --- the optimizer ---------------------------------------------------------------------------------------------------


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


def print_message(text: str) -> None:
    """Prints a line as Keras's callbacks do: to the terminal, or to the log where the user turned that off."""
    try:
        from keras.src.utils.io_utils import print_msg
    except ImportError:
        print_msg = print
    print_msg(text)
