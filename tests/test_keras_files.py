"""How stock Keras is watched, and the public ways beside its private parts."""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zoo
from keras_file_reader import Contents, assert_same, read_hdf5
from runs import fit, make_model

from offstep import keras_files
from offstep.keras_files import describe_archive, find_difference, list_all_variables, plan_file, render_file
from offstep.keras_rebuild import find_saving_lib

Model = Any  # Keras carries no types


def values_of(model: Model) -> list[np.ndarray]:
    return [np.asarray(variable.value) for variable in list_all_variables(model)]


@pytest.fixture(scope="module")
def trained() -> Model:
    """The model of `runs` after an epoch. Not to be changed."""
    model = make_model()
    fit(model, [], epochs=1)
    return model


@pytest.fixture
def without_private_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Keras that has only what it documents; but it does not look at a new optimizer for each one that it saves."""
    lib: Any = find_saving_lib()
    rest = SimpleNamespace(get_attr_skipset=lib.get_attr_skipset)
    monkeypatch.setattr(keras_files, "find_saving_lib", lambda: rest)


@pytest.mark.usefixtures("without_private_parts")
@pytest.mark.parametrize("name", ["functional", "subclassed", "mixed_bfloat16", "names_its_variables", "scaled_loss"])
def test_the_public_way_finds_the_same_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.FILES[name]()
    model.fit(*zoo.make_data(), verbose=0)
    publicly = plan_file(model)
    assert find_difference(model, publicly, values_of(model)) == ""
    monkeypatch.undo()
    assert publicly == plan_file(model)
    assert publicly.reason == ""


@pytest.mark.usefixtures("without_private_parts")
@pytest.mark.parametrize("kind", ["keras_weights", "keras_archive"])
def test_the_public_way_renders_the_same_file(kind: str, trained: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    values = values_of(trained)
    publicly = render_file(trained, kind, values)
    monkeypatch.undo()
    assert_same(read_weights(publicly), read_weights(render_file(trained, kind, values)))


def read_weights(content: bytes) -> Contents:
    if zipfile.is_zipfile(io.BytesIO(content)):
        content = zipfile.ZipFile(io.BytesIO(content)).read("model.weights.h5")
    return read_hdf5(io.BytesIO(content))


def test_values_other_than_the_models_own_are_rendered(tmp_path: Path) -> None:
    model = make_model()
    fit(model, [], epochs=1)
    before = values_of(model)
    fit(model, [], epochs=1)
    (tmp_path / "old.weights.h5").write_bytes(render_file(model, "keras_weights", before))
    other = make_model()
    fit(other, [], epochs=1)
    assert [array.tobytes() for array in values_of(model)] != [array.tobytes() for array in before]
    other.load_weights(tmp_path / "old.weights.h5")
    weights = len(model.trainable_variables)
    assert [array.tobytes() for array in values_of(other)[:weights]] == [array.tobytes() for array in before[:weights]]


def test_planning_changes_nothing_in_the_model(trained: Model) -> None:
    before = [array.tobytes() for array in values_of(trained)]
    plan = plan_file(trained)
    assert plan.reason == ""
    assert [array.tobytes() for array in values_of(trained)] == before


def test_metrics_and_seeds_are_left_out_where_stock_keras_leaves_them_out(trained: Model) -> None:
    seeds = {number for number, variable in enumerate(list_all_variables(trained)) if "seed" in variable.path}
    assert seeds
    assert not seeds & set(plan_file(trained).sources.values())


def test_errors_made_of_warnings_keep_no_file_from_being_planned(trained: Model) -> None:
    """With `-W error` Keras's own deprecated calls were taken for layers that compute what they save."""
    expected, values = plan_file(trained), values_of(trained)
    with warnings.catch_warnings(action="error"):
        plan = plan_file(trained)
        assert find_difference(trained, plan, values) == ""
        assert describe_archive(trained) is not None
    assert plan == expected
    assert plan.reason == ""


@pytest.mark.parametrize("change", ["value", "missing", "group"])
def test_a_difference_is_found_and_named(change: str, trained: Model) -> None:
    plan, values = plan_file(trained), values_of(trained)
    path, number = next(iter(plan.sources.items()))
    if change == "value":
        other = next(n for n, value in enumerate(values) if value.shape != values[number].shape)
        plan = keras_files.FilePlan({**plan.sources, path: other}, plan.groups)
        assert find_difference(trained, plan, values) == f"{path} is not what stock Keras writes"
    elif change == "missing":
        plan = keras_files.FilePlan({**plan.sources, "layers/ghost/vars/0": number}, plan.groups)
        assert find_difference(trained, plan, values) == "layers/ghost/vars/0 is not what stock Keras writes"
    else:
        plan = keras_files.FilePlan(plan.sources, {**plan.groups, "ghost/vars": {}})
        assert find_difference(trained, plan, values) == "its groups are not those of stock Keras"
