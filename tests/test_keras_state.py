"""Against real Keras: names that stock `load_model` finds again, and arrays that a training step works on."""

from __future__ import annotations

import json
import os
import pickle
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import interpreters
import jax
import keras
import numpy as np
import pytest
import zoo
from keras import layers

from offstep.keras_names import KerasState, describe_state
from offstep.keras_rebuild import (
    GROUPS,
    collect_assets,
    deserialize_model,
    find_saving_lib,
    list_layers,
    serialize_model,
    take_inventory,
)
from offstep.keras_state import live_arrays, live_state, state_signature

Model = Any  # Keras carries no types

SOME_AND_ALL = [pytest.param(name, marks=() if name in zoo.SPREAD else pytest.mark.campaign) for name in zoo.ZOO]
ALIASED = ("sequential_with_input", "sequential_built_by_fit", "subclassed", "nested")


def saved_form(model: Model, state: KerasState, *, with_aliases: bool) -> dict[str, Any]:  # for reload_states.py
    arrays = [np.asarray(array) for array in live_arrays(model)]
    names = [*enumerate(state.paths), *(state.aliases if with_aliases else ())]
    return {
        "config": state.config,
        "leaves": [(path, arrays[i]) for i, path in names],
        "assets": [(tuple(path.split("/")), np.frombuffer(data, np.uint8)) for path, data in state.assets.items()],
        "expected": {group: [np.asarray(v.value) for v in variables_of(model, group)] for group in GROUPS[:3]},
        "words": [layer.words for layer in zoo.find_vocabularies(model)],
        "prediction": np.asarray(model(zoo.make_data()[0], training=False), "float32"),
    }


def variables_of(model: Model, group: str) -> list[Any]:  # of keras.Variable
    return model.optimizer.variables if group == "optimizer_variables" else getattr(model, group)


def reload_in_fresh_process(directory: Path) -> dict[str, str]:
    script = Path(__file__).with_name("reload_states.py")
    environment = os.environ | {"PYTHONPATH": str(script.parent), "KERAS_BACKEND": "jax"}
    done = interpreters.run([script, directory], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def variables_in_order(model: Model) -> list[Any]:  # of keras.Variable
    return [v for group in GROUPS for v in variables_of(model, group)]


class ByName(dict[str, Any]):  # models and states
    """Holds what was asked for, made when it first is."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> Any:
        self[name] = self._make(name)
        return self[name]


class Zoo(NamedTuple):
    """Models of the zoo, trained, with their states."""

    models: dict[str, Model]
    states: dict[str, KerasState]


@pytest.fixture(scope="module")
def trained() -> Zoo:
    models = ByName(zoo.make_trained)
    return Zoo(models, ByName(lambda name: describe_state(models[name])))


def find_differences(names: Iterable[str], trained: Zoo, directory: Path) -> dict[str, str]:
    """What a fresh process finds wrong after it reloaded each state, plain ("name0") and with aliases ("name1")."""
    for name in names:
        for with_aliases in (False, True) if name in ALIASED else (False,):
            form = saved_form(trained.models[name], trained.states[name], with_aliases=with_aliases)
            (directory / f"{name}{with_aliases:d}.pickle").write_bytes(pickle.dumps(form))
    return reload_in_fresh_process(directory)


class AtHook(keras.callbacks.Callback):
    """Calls `look` with the model, not synchronised by the callback, at one hook of `fit`."""

    def __init__(self, hook: str, look: Callable[[Model], None]) -> None:
        super().__init__()
        setattr(self, hook, lambda *_args, **_kwargs: look(self._model))


class PublicView:
    """A model as it would be without private attributes."""

    def __init__(self, model: Model) -> None:
        object.__setattr__(self, "model", model)

    def __getattr__(self, name: str) -> Any:  # whatever the model has
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.model, name)


def fit(model: Model, *callbacks: keras.callbacks.Callback, **options: Any) -> None:  # options of `Model.fit`
    model.fit(*zoo.make_data(), batch_size=4, verbose=0, callbacks=list(callbacks), **options)


def values_after_sync(model: Model) -> list[np.ndarray]:
    model.jax_state_sync()
    return [np.array(v.value) for v in variables_in_order(model)]


def assert_equal_arrays(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    assert [a.tobytes() for a in actual] == [a.tobytes() for a in expected]


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME_AND_ALL)
def test_iteration_index_is_that_of_the_batch_counter(name: str, trained: Zoo) -> None:
    index = trained.states[name].iteration_index

    assert index is not None
    assert int(live_arrays(trained.models[name])[index]) == 2 * zoo.ROWS // 4


def test_stock_load_model_finds_every_value_in_a_fresh_process(trained: Zoo, tmp_path: Path) -> None:
    differences = find_differences({*zoo.SPREAD, *ALIASED}, trained, tmp_path)
    assert set(differences) >= {f"{name}1" for name in ALIASED}, "aliases do not disturb it"
    assert set(differences.values()) == {""}, differences


@pytest.mark.campaign
def test_so_it_does_of_the_other_models_of_the_zoo(trained: Zoo, tmp_path: Path) -> None:
    differences = find_differences({*zoo.ZOO} - {*zoo.SPREAD, *ALIASED}, trained, tmp_path)
    assert set(differences.values()) == {""}, differences


@pytest.mark.parametrize("name", ALIASED)
def test_aliases_make_load_weights_find_every_value(name: str, trained: Zoo) -> None:
    model, state = trained.models[name], trained.states[name]
    expected = [np.array(array) for array in live_arrays(model)]
    for group in GROUPS[:3]:
        for variable in variables_of(model, group):
            variable.assign(keras.ops.zeros_like(variable.value))

    # What `load_weights` does with the tree that it reads from a directory.
    leaves = [(path, expected[i]) for i, path in (*enumerate(state.paths), *state.aliases)]
    model.set_state_tree(zoo.make_tree(leaves))

    count = sum(path[0] != "metrics_variables" for path in state.paths)
    assert_equal_arrays([np.array(array) for array in live_arrays(model)][:count], expected[:count])


def test_models_with_names_of_their_own_need_no_notes(trained: Zoo) -> None:
    for name in ("functional", "dropout_and_batch_norm", "sequential_with_input", "nested", "frozen", "with_assets"):
        assert trained.states[name].notes == ()


def test_sublayers_that_keras_numbers_are_noted(trained: Zoo) -> None:
    (note,) = trained.states["subclassed"].notes

    assert "numbers some parts of this model (dense, dense_1, dense_2)" in note
    assert "keras.utils.clear_session()" in note


def test_classes_and_functions_that_nobody_registered_are_noted(trained: Zoo) -> None:
    (layer_note,) = trained.states["unregistered_layer"].notes
    (loss_note,) = trained.states["unregistered_loss"].notes

    assert "needs custom_objects" in layer_note
    assert "Could not locate class 'Shift'" in layer_note
    assert "Could not locate function 'double_error'" in loss_note


def test_adapted_layers_that_load_model_leaves_unfinished_are_noted(trained: Zoo) -> None:
    (note,) = trained.states["normalized"].notes

    assert "call finalize_state() on the adapted layers of this model (normalization)" in note


def test_assets_are_named_by_their_place_in_the_model(trained: Zoo) -> None:
    assert trained.states["with_assets"].assets == {"layers/vocabulary/words.txt": b"cat\ndog"}


def test_model_that_cannot_be_serialised_keeps_its_live_names_and_says_so() -> None:
    class Opaque(keras.Model):
        def __init__(self, secret: object) -> None:
            super().__init__()
            self.secret = secret
            self.dense = layers.Dense(zoo.WIDTH)

        def call(self, x: Any) -> Any:  # backend tensors
            return self.dense(x)

    model = Opaque(object())
    model.compile("sgd", "mse")
    fit(model)

    state = describe_state(model)

    assert state.config is None
    assert state.paths[0] == ("trainable_variables", *model.trainable_variables[0].path.split("/"))
    assert "load_model cannot rebuild this model: NotImplementedError: Object Opaque" in state.notes[0]
    assert "use load_weights" in state.notes[0]


def test_model_that_keras_rebuilds_differently_keeps_its_live_names_and_says_so() -> None:
    # A layer shared between a model and its inner model comes back as two layers of the same name.
    dense, inputs = layers.Dense(zoo.WIDTH), layers.Input((zoo.WIDTH,))
    inner = keras.Sequential([layers.Input((zoo.WIDTH,)), dense])
    model = keras.Model(inputs, dense(inner(inputs)))
    model.compile("sgd", "mse")

    state = describe_state(model)

    assert state.paths[0] == ("trainable_variables", *dense.kernel.path.split("/"))
    assert "it has 2 variables, but 4 after it was rebuilt from its config" in state.notes[0]


def test_model_whose_layers_read_values_while_they_are_built_is_rebuilt_with_values() -> None:
    model = keras.Sequential([layers.Input((zoo.WIDTH,)), zoo.ReadsItsWeights(), layers.Dense(zoo.WIDTH, name="last")])
    model.compile("sgd", "mse")

    state = describe_state(model)

    assert ("trainable_variables", "last", "kernel") in state.paths
    assert state.notes == ()


def test_weights_frozen_after_the_model_was_made_lie_where_the_rebuilt_model_has_them() -> None:
    # The constructor of a subclassed model knows nothing of layers that were frozen later.
    model = zoo.Branches(1)
    model(zoo.make_data()[0])
    model.tail.trainable = False
    model.compile("adam", "mse")
    fit(model)

    state = describe_state(model)

    path = state.paths[[id(v) for v in variables_in_order(model)].index(id(model.tail.kernel))]
    assert path == ("trainable_variables", "dense", "kernel")
    assert "does not restore the optimizer's state of this model: it has 14 variables, but 18" in state.notes[-1]


def test_names_that_mean_something_else_in_a_fresh_process_are_noted(tmp_path: Path) -> None:
    zoo.make_trained("subclassed").save(tmp_path / "model.keras")
    keras.utils.clear_session()
    layers.Dense(1)
    layers.BatchNormalization()
    model = keras.saving.load_model(tmp_path / "model.keras")

    state = describe_state(model)

    assert state.aliases == ()
    assert any("not with load_weights" in note for note in state.notes)


def test_model_without_optimizer_is_described_and_noted() -> None:
    state = describe_state(keras.Sequential([layers.Input((zoo.WIDTH,)), layers.Dense(2)]))

    assert state.empty_nodes == tuple(((group,), "Dict") for group in GROUPS[1:])
    assert state.iteration_index is None
    assert "it has no optimizer, and load_model needs one" in state.notes[0]


def test_weights_only_has_the_live_names_as_stock_has_them(trained: Zoo) -> None:
    model = trained.models["sequential_with_input"]

    state = describe_state(model, weights_only=True)

    tree = model.get_state_tree()
    leaves = [(path, None) for path in state.paths]
    assert jax.tree.structure(zoo.make_tree(leaves), is_leaf=lambda x: x is None) == jax.tree.structure(
        {group: tree[group] for group in GROUPS[:2]}
    )
    assert (state.config, state.assets, state.notes) == (None, {}, ())


def test_variables_of_the_same_name_are_refused() -> None:
    model = zoo.Twins()
    model.compile("sgd", "mse")
    fit(model)

    with pytest.raises(ValueError, match="twin/kernel: several variables of the model have this path"):
        describe_state(model)
    with pytest.raises(ValueError, match="give unique names to the layers"):
        describe_state(model, weights_only=True)


def test_metrics_of_the_same_name_are_told_apart() -> None:
    inputs = layers.Input((zoo.WIDTH,))
    model = keras.Model(inputs, [layers.Dense(zoo.WIDTH)(inputs), layers.Dense(zoo.WIDTH)(inputs)])
    model.compile("sgd", ["mse", "mse"], metrics=[["mae"], ["mae"]])
    x, y = zoo.make_data()
    model.fit(x, [y, y], verbose=0)

    state = describe_state(model)

    assert ("metrics_variables", "mean_absolute_error", "total__2") in state.paths
    assert state.notes == ()


def test_describing_leaves_names_and_random_generators_as_they_were(trained: Zoo) -> None:
    before = layers.Dense(1).name, layers.Dropout(0.1).seed_generator.name
    numpy_state, python_state = np.random.get_state()[1].tolist(), random.getstate()

    describe_state(trained.models["subclassed"])

    after = layers.Dense(1).name, layers.Dropout(0.1).seed_generator.name
    assert [int(name.rsplit("_", 1)[1]) for name in after] == [int(name.rsplit("_", 1)[1]) + 1 for name in before]
    assert np.random.get_state()[1].tolist() == numpy_state
    assert random.getstate() != python_state  # by the Dropout made just above, and by nothing else
    random.setstate(python_state)


def test_names_do_not_depend_on_the_distribution() -> None:
    script = Path(__file__).with_name("distributed_names.py")
    environment = os.environ | {
        "PYTHONPATH": f"{script.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }

    done = interpreters.run([script], env=environment)

    assert done.returncode == 0, done.stderr[-3000:]
    plain, data_parallel, model_parallel = json.loads(done.stdout.splitlines()[-1])
    assert plain == data_parallel == model_parallel
    assert plain[0] == ["trainable_variables", "dense", "kernel"]


# --- live arrays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hook",
    [
        *("on_train_batch_begin", "on_train_batch_end", "on_test_begin", "on_epoch_end"),
        *(
            pytest.param(f"on_{name}", marks=pytest.mark.campaign)
            for name in ("epoch_begin", "test_batch_begin", "test_batch_end", "test_end", "train_end")
        ),
    ],
)
def test_live_arrays_are_the_state_at_every_hook_of_fit(hook: str) -> None:
    seen = 0

    def look(model: Model) -> None:
        nonlocal seen
        was_synced = model._jax_state_synced
        actual = [np.array(array) for array in live_arrays(model)]
        assert model._jax_state_synced == was_synced
        assert_equal_arrays(actual, values_after_sync(model))
        seen += 1

    fit(zoo.dropout_and_batch_norm(), AtHook(hook, look), epochs=2, validation_data=zoo.make_data())

    assert seen >= 1


def test_live_arrays_follow_train_on_batch() -> None:
    model = zoo.make_trained("functional")
    model.train_on_batch(*zoo.make_data())

    assert_equal_arrays([np.array(array) for array in live_arrays(model)], values_after_sync(model))


def test_weights_only_has_the_first_two_groups(trained: Zoo) -> None:
    model = trained.models["dropout_and_batch_norm"]

    assert live_arrays(model, weights_only=True) == live_arrays(model)[: len(model.variables)]


@pytest.mark.parametrize("hook", ["on_train_batch_begin", "on_train_batch_end", "on_test_batch_end"])
def test_live_arrays_are_found_without_private_attributes(hook: str) -> None:
    def look(model: Model) -> None:
        public = [np.array(array) for array in live_arrays(PublicView(model))]
        assert_equal_arrays(public, values_after_sync(model))

    fit(zoo.dropout_and_batch_norm(), AtHook(hook, look), validation_data=zoo.make_data())


@pytest.mark.parametrize("name", ["functional", "with_assets"])
def test_config_and_assets_are_found_without_private_functions(name: str, trained: Zoo) -> None:
    model = trained.models[name]
    saving_lib = find_saving_lib()

    config, _ = serialize_model(model, None)

    assert config is not None
    rebuilt = take_inventory(deserialize_model(config, {}, None))
    assert [v.name for v in rebuilt.weights] == [v.path for v in model.variables]
    assert collect_assets(model, None) == collect_assets(model, saving_lib)


def test_layers_are_found_without_private_functions(trained: Zoo) -> None:
    model = trained.models["nested"]

    assert {id(layer) for layer in list_layers(PublicView(model))} >= {id(layer) for layer in model.layers}


def test_lost_values_are_an_error_that_names_the_variable() -> None:
    model = zoo.functional()

    def fail(_model: Model) -> None:
        # Keras takes the values out of the variables before it calls this.
        model.train_function = None

    with pytest.raises(TypeError):
        fit(model, AtHook("on_train_batch_begin", fail))

    with pytest.raises(
        RuntimeError, match=r"dense.*/kernel: the variable has no value; was a training step interrupted"
    ):
        live_arrays(model)


def test_state_can_be_described_between_two_steps() -> None:
    described: list[KerasState] = []
    watched, plain = zoo.scheduled(), zoo.scheduled()
    plain.set_weights(watched.get_weights())

    fit(watched, AtHook("on_train_batch_end", lambda model: described.append(describe_state(model))))
    fit(plain)

    assert len(set(described[0].paths)) == len(live_arrays(watched))
    assert len({state.paths for state in described}) == 1


# --- signature -------------------------------------------------------------------------------------------------------


def test_signature_is_the_same_within_and_after_fit() -> None:
    signatures = []
    model = zoo.make_trained("dropout_and_batch_norm")

    def note_signature(model: Model) -> None:
        signatures.append(state_signature(model))

    fit(model, AtHook("on_train_batch_end", note_signature), AtHook("on_epoch_end", note_signature))

    assert set(signatures) == {state_signature(model)}


def freeze(model: Model) -> None:
    model.layers[1].trainable = False


def compile_again(model: Model) -> None:
    model.compile(model.optimizer, "mse")


def add_low_rank(model: Model) -> None:
    model.layers[1].enable_lora(2)


@pytest.mark.parametrize("change", [freeze, compile_again, add_low_rank])
def test_signature_changes_with_the_model(change: Callable[[Model], None]) -> None:
    model = zoo.make_trained("functional")
    before = state_signature(model)

    change(model)

    assert state_signature(model) != before


def test_cost_per_leaf_is_printed() -> None:
    x = inputs = layers.Input((2,))
    for _ in range(60):
        x = layers.Dense(2)(x)
    model = keras.Model(inputs, x)
    model.compile("adam", "mse")
    costs: dict[str, list[float]] = {"detached": [], "attached": []}

    def measure(model: Model) -> None:
        for samples in costs.values():
            start = time.perf_counter()
            arrays, _ = live_state(model)
            samples.append((time.perf_counter() - start) / len(arrays))
            model.jax_state_sync()

    data = np.zeros((20, 2), "float32")
    model.fit(data, data, batch_size=1, verbose=0, callbacks=[AtHook("on_train_batch_end", measure)])
    start = time.perf_counter()
    state = describe_state(model)
    described_seconds = time.perf_counter() - start

    per_leaf = {kind: f"{statistics.median(samples) * 1e9:.0f} ns" for kind, samples in costs.items()}
    print(f"{len(state.paths)} leaves: {per_leaf} a leaf; described in {described_seconds:.2f} s")
