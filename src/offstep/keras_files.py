"""Which array of a model's state becomes which dataset of a Keras file, found by watching stock Keras save the model.

Stock Keras is run inside `keras.StatelessScope`, where each variable has a token in place of its value. A dataset that
comes out as a token is that variable, whole and unchanged, so that the writer can make it without Keras. Whatever else
comes out was computed by the layer itself: such a file has to be written by Keras, see `render_file`.

Private parts of Keras are looked up when they are needed, and have a public way beside them.
"""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import keras
import ml_dtypes
import numpy as np

from offstep.keras_rebuild import (
    GROUPS,
    Model,
    Variable,
    collect_assets,
    find_global_state,
    find_saving_lib,
    list_variables,
    serialize_model,
)

Groups = dict[str, dict[str, str]]
"""Attributes of the HDF5 groups that hold variables, by path."""

# What Keras's `_obj_type` may return.
_KINDS = ("Operation", "Layer", "Functional", "Sequential", "Metric", "Optimizer", "Loss", "Cross", "Feature")
# Neither sums, products nor casts of tokens are tokens, and none fits into 32 bits or a float.
_FIRST_TOKEN = 0x1B87_3593_0000_0001
_TOKEN_STRIDE = 1 << 20


Convert = Callable[[str, np.ndarray], Any]
"""What to keep of a dataset, by its path and value."""


@dataclass(frozen=True)
class FilePlan:
    """Where the datasets of a model's weights file come from.

    Attributes:
        sources: Path in the HDF5 file → number of the variable, counted as `live_arrays` counts arrays.
        groups: Groups that hold variables.
        reason: Why the writer cannot make the file by itself; empty when it can.
    """

    sources: Mapping[str, int]
    groups: Groups
    reason: str = ""


def plan_file(model: Model) -> FilePlan:
    """Finds out what stock Keras would write into a `.weights.h5` file; some 10 us for each variable.

    On the thread that trains; touches no value of the model.
    """
    count = len(list_all_variables(model))
    tokens = {_FIRST_TOKEN + number * _TOKEN_STRIDE: number for number in range(count)}
    try:
        with warnings.catch_warnings(action="ignore"):  # Keras's own are no reason, where the user made errors of them
            groups, values = _record_file(
                model, [np.array(token, np.int64) for token in tokens], lambda path, value: value
            )
    except Exception as error:  # noqa: BLE001  a layer that computes fails on tokens, in any way
        return FilePlan({}, {}, f"a layer computes what it saves ({type(error).__name__})")
    sources = {}
    for path, value in values.items():
        number = tokens.get(int(value)) if value.shape == () and value.dtype == np.int64 else None
        if number is None:
            return FilePlan({}, {}, f"{path} is computed by its layer")
        sources[path] = number
    return FilePlan(sources, groups)


def find_difference(model: Model, plan: FilePlan, arrays: Sequence[np.ndarray]) -> str:
    """Returns in what the planned file differs from the one that stock Keras would write of `arrays`; empty if not.

    Any thread, also while the model trains. Empty too where Keras warns and the user made errors of warnings: then
    stock Keras writes no file to compare with.
    """

    def is_planned(path: str, value: np.ndarray) -> bool:
        return path in plan.sources and _is_same(value, arrays[plan.sources[path]])

    try:
        groups, same = _record_file(model, arrays, is_planned)
    except Warning:  # filters belong to all threads: here none may be changed
        return ""
    except Exception as error:  # noqa: BLE001  a layer may raise anything
        return f"stock Keras cannot save the model: {type(error).__name__}: {error}"
    differing = [path for path, is_same in same.items() if not is_same]
    missing = plan.sources.keys() - same.keys()
    if differing or missing:
        return f"{(differing or sorted(missing))[0]} is not what stock Keras writes"
    return "" if groups == plan.groups else "its groups are not those of stock Keras"


def _is_same(first: np.ndarray, second: np.ndarray) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if first is second:
        return True
    return np.array_equal(_bytes_of(first), _bytes_of(second))  # bytes, because no NaN is equal to itself


def _bytes_of(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def list_all_variables(model: Model) -> list[Variable]:
    """Returns the variables in the order in which `keras_state.live_arrays` returns their arrays."""
    return [variable for group in GROUPS for variable in list_variables(model, group)]


# --- stock Keras, watched --------------------------------------------------------------------------------------------


def _record_file(model: Model, values: Sequence[np.ndarray], convert: Convert) -> tuple[Groups, dict[str, Any]]:
    """Returns what stock Keras would write to a weights file if the variables had these values."""
    store = _find_store()
    with _values_in_place(model, values):
        if store is None:
            return _record_publicly(model, convert)
        recorder = _make_recorder(store, convert)
        _save_state(model, recorder)
        return recorder.groups, recorder.values


def _find_store() -> Any:  # Keras's private class of weights files, or None where this Keras has none
    saving_lib = find_saving_lib()
    return getattr(saving_lib, "H5IOStore", None) if hasattr(saving_lib, "_save_state") else None


def _save_state(model: Model, store: Any) -> None:  # of H5IOStore
    saving_lib: Any = find_saving_lib()  # a module without types
    saving_lib._save_state(model, weights_store=store, assets_store=None, inner_path="", visited_saveables=set())


class _Value(np.ndarray):
    """An array that Keras takes for a tensor of TensorFlow too."""

    def numpy(self) -> np.ndarray:
        return np.asarray(self)


@contextmanager
def _values_in_place(model: Model, values: Sequence[np.ndarray]) -> Iterator[None]:
    """Lets this thread see `values` in the variables."""
    scope = keras.StatelessScope(initialize_variables=False)
    for variable, value in zip(list_all_variables(model), values, strict=True):
        # Unlike the constructor, this takes values of any shape and dtype.
        scope.add_update((variable, np.asarray(value).view(_Value)))
    with _attributes_known(), scope:
        yield


@contextmanager
def _attributes_known() -> Iterator[None]:
    """Lets this thread save objects without making one of each kind first, to see which attributes all have.

    Keras 3.15 does so for each object, because it looks for what it has found under another name than it keeps it;
    that costs most of the time, and within a scope it fails: an optimizer makes variables.
    """
    find = getattr(find_saving_lib(), "get_attr_skipset", None)
    state = find_global_state()
    if find is None or state is None:
        yield
        return
    names = {f"saving_attr_{word}_{kind}": kind for kind in _KINDS for word in ("skiplist", "skipset")}
    known = {kind: find(kind) for kind in _KINDS}
    before = {name: state.get_global_attribute(name) for name in names}
    try:
        for name, kind in names.items():
            state.set_global_attribute(name, known[kind])
        yield
    finally:
        for name, value in before.items():
            state.set_global_attribute(name, value)


def _make_recorder(store: Any, convert: Convert) -> Any:  # H5IOStore
    class Recorder(store):  # type: ignore[misc]  # Keras takes no store that is not of this class
        def __init__(self) -> None:
            self.groups: Groups = {}
            self.values: dict[str, Any] = {}
            self._path = ""

        def __bool__(self) -> bool:
            return True

        def make(self, path: str, metadata: dict[str, str] | None = None) -> Any:
            self._path = f"{path}/vars" if path else "vars"
            if metadata:
                self.groups[self._path] = dict(metadata)
            return self

        def __setitem__(self, key: str, value: Any) -> None:
            self.groups.setdefault(self._path, {})
            path = f"{self._path}/{key}"
            self.values[path] = convert(path, _to_numpy(value))

        def __getitem__(self, key: str) -> Any:
            return self.values[f"{self._path}/{key}"]

        def __delitem__(self, key: str) -> None:
            del self.values[f"{self._path}/{key}"]

        def __contains__(self, key: object) -> bool:
            return f"{self._path}/{key}" in self.values

        def keys(self) -> list[str]:
            return [path[len(self._path) + 1 :] for path in self.values if path.startswith(f"{self._path}/")]

        def __len__(self) -> int:
            return len(self.keys())

    return Recorder()


def _to_numpy(value: Any) -> np.ndarray:  # whatever a layer puts into the store
    if isinstance(value, keras.Variable):
        value = value.value
    array: np.ndarray = value if isinstance(value, np.ndarray) else keras.ops.convert_to_numpy(value)
    return array


def _record_publicly(model: Model, convert: Convert) -> tuple[Groups, dict[str, Any]]:
    groups: Groups = {}
    values: dict[str, Any] = {}

    def visit(path: str, node: Any) -> None:  # a group or dataset of h5py
        if isinstance(node, h5py.Dataset):
            array = np.array(node)
            values[path] = convert(path, array.view(ml_dtypes.bfloat16) if "dtype" in node.attrs else array)
        elif path.rsplit("/", 1)[-1] == "vars":
            groups[path] = dict(node.attrs)

    with h5py.File(io.BytesIO(_render_publicly(model.save_weights, "recorded.weights.h5"))) as file:
        file.visititems(visit)
    return groups, values


# --- what else is in a file ------------------------------------------------------------------------------------------


def describe_archive(model: Model) -> dict[str, Any] | None:  # JSON
    """Returns what a `.keras` file holds beside the arrays; `None` where Keras cannot serialise the model.

    Within `fit` the model has to be synchronised before.
    """
    saving_lib = find_saving_lib()
    config, _ = serialize_model(model, saving_lib)
    if config is None:
        return None
    assets = {name: content.hex() for name, content in collect_assets(model, saving_lib).items()}
    return {"config": config, "metadata": {"keras_version": keras.__version__}, "assets": assets}


# --- files that Keras has to write itself ----------------------------------------------------------------------------


def render_file(model: Model, format: str, arrays: Sequence[np.ndarray]) -> bytes:  # noqa: A002  as in records
    """Returns the file that stock Keras would write if the model's variables had the values `arrays`.

    Any thread, also while the model trains. It is made in memory: an open HDF5 file on a disk that fills up ends the
    process with SIGSEGV.
    """
    render = {"keras_weights": _render_weights, "keras_archive": _render_archive, "keras_legacy": _render_legacy}
    with _values_in_place(model, arrays):
        return render[format](model)


def _render_weights(model: Model) -> bytes:
    make_store = _find_store()
    if make_store is None:
        return _render_publicly(model.save_weights, "rendered.weights.h5")
    content = io.BytesIO()
    store = make_store(content, mode="w")
    try:
        _save_state(model, store)
    finally:
        store.close()
    return content.getvalue()


def _render_archive(model: Model) -> bytes:
    save = getattr(find_saving_lib(), "save_model", None)
    if save is None:
        return _render_publicly(model.save, "rendered.keras")
    content = io.BytesIO()
    save(model, content)
    return content.getvalue()


def _render_legacy(model: Model) -> bytes:
    try:
        from keras.src.legacy.saving.legacy_h5_format import save_model_to_hdf5
    except ImportError:
        return _render_publicly(model.save, "rendered.h5")
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        save_model_to_hdf5(model, file)
    return content.getvalue()


def _render_publicly(save: Callable[[Path], None], name: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        save(path)
        return path.read_bytes()
