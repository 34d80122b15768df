"""Keras models of every kind whose variables get their names in another way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

Model = Any  # Keras carries no types
WIDTH = 6
ROWS = 16


@keras.saving.register_keras_serializable("zoo")
class Scale(layers.Layer):
    """A custom layer whose variable Keras has to name."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.scale = self.add_weight(shape=(input_shape[-1],), initializer="ones")

    def call(self, x: Any) -> Any:  # backend tensors
        return x * self.scale


class Shift(layers.Layer):
    """A custom layer that nobody registered."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.shift = self.add_weight(shape=(input_shape[-1],), initializer="zeros", name="shift")

    def call(self, x: Any) -> Any:  # backend tensors
        return x + self.shift


@keras.saving.register_keras_serializable("zoo")
class Vocabulary(layers.Layer):
    """A custom layer with an asset."""

    def __init__(self, words: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.words = tuple(words)

    def call(self, x: Any) -> Any:  # backend tensors
        return x

    def save_assets(self, dir_path: str) -> None:
        Path(dir_path, "words.txt").write_text("\n".join(self.words))

    def load_assets(self, dir_path: str) -> None:
        self.words = tuple(Path(dir_path, "words.txt").read_text().split("\n"))


@keras.saving.register_keras_serializable("zoo")
class Branches(keras.Model):
    """A subclassed model with layers in lists and dicts, numbered by Keras, and one that `call` meets first."""

    def __init__(self, depth: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.depth = depth
        self.tail = layers.Dense(WIDTH)
        self.blocks = [layers.Dense(WIDTH, activation="relu") for _ in range(depth)]
        self.gates = {"left": layers.Dense(WIDTH), "right": layers.BatchNormalization()}
        self.noise = layers.Dropout(0.3)
        self.score = keras.metrics.Mean()

    def call(self, x: Any, training: bool = False) -> Any:  # backend tensors
        for block in self.blocks:
            x = self.noise(block(x), training=training)
        return self.tail(self.gates["right"](self.gates["left"](x), training=training))

    def get_config(self) -> dict[str, Any]:
        return {"depth": self.depth, "name": self.name}


@keras.saving.register_keras_serializable("zoo")
class ReadsItsWeights(layers.Layer):
    """A custom layer that can only be built with real values."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.weight = self.add_weight(shape=(input_shape[-1],), name="weight")
        self.total = float(np.asarray(self.weight).sum())

    def call(self, x: Any) -> Any:  # backend tensors
        return x * self.weight


@keras.saving.register_keras_serializable("zoo")
class Twins(keras.Model):
    """A subclassed model with two layers of one name."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.left, self.right = layers.Dense(WIDTH, name="twin"), layers.Dense(WIDTH, name="twin")

    def call(self, x: Any) -> Any:  # backend tensors
        return self.left(self.right(x))


def double_error(y_true: Any, y_pred: Any) -> Any:  # backend tensors
    return 2.0 * keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)


def _compile(model: Model, optimizer: Any = "adam", loss: Any = "mse") -> Model:  # what Keras takes
    model.compile(optimizer, loss, metrics=["mae"])
    return model


def _functional(*middle: Any, optimizer: Any = "adam", loss: Any = "mse") -> Model:  # layers; what Keras takes
    inputs = x = layers.Input((WIDTH,))
    for layer in middle:
        x = layer(x)
    return _compile(keras.Model(inputs, layers.Dense(WIDTH)(x)), optimizer, loss)


def functional() -> Model:
    return _functional(layers.Dense(4), layers.Dense(5))


def dropout_and_batch_norm() -> Model:
    return _functional(layers.Dropout(0.2), layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5))


def sequential_with_input() -> Model:
    return _compile(
        keras.Sequential([layers.Input((WIDTH,)), layers.Dense(4), layers.Dropout(0.1), layers.Dense(WIDTH)])
    )


def sequential_built_by_fit() -> Model:
    return _compile(keras.Sequential([layers.Dense(4), layers.BatchNormalization(), layers.Dense(WIDTH)]))


def sequential_without_names_in_order() -> Model:
    later, sooner = layers.Dense(WIDTH), layers.Dense(WIDTH)
    return _compile(keras.Sequential([layers.Input((WIDTH,)), sooner, later]))


def subclassed() -> Model:
    return _compile(Branches(3))


def nested() -> Model:
    inner = keras.Sequential([layers.Dense(4), layers.Dropout(0.1), layers.Dense(5)])
    return _functional(inner, keras.Sequential([layers.Input((5,)), layers.Dense(4)]))


def shared() -> Model:
    dense = layers.Dense(WIDTH)
    inputs = layers.Input((WIDTH,))
    return _compile(keras.Model(inputs, layers.add([dense(inputs), dense(dense(inputs))])))


def recurrent() -> Model:
    return _functional(layers.Reshape((WIDTH, 1)), layers.GRU(4, dropout=0.1), layers.Dense(3))


def attention() -> Model:
    heads = layers.MultiHeadAttention(2, 3, dropout=0.1)
    inputs = layers.Input((WIDTH,))
    x = layers.Reshape((WIDTH, 1))(inputs)
    return _compile(keras.Model(inputs, layers.Dense(WIDTH)(layers.Flatten()(heads(x, x)))))


def embedding() -> Model:
    return _functional(layers.Embedding(11, 3), layers.Flatten())


def mixed_bfloat16() -> Model:
    return _functional(layers.Dense(4, dtype="mixed_bfloat16"), layers.Dense(4, dtype="bfloat16"))


def moving_average() -> Model:
    return _functional(optimizer=keras.optimizers.AdamW(use_ema=True, ema_momentum=0.9))


def accumulated_gradients() -> Model:
    return _functional(optimizer=keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2))


def scaled_loss() -> Model:
    return _functional(optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), initial_scale=8.0))


def scheduled() -> Model:
    return _functional(optimizer=keras.optimizers.Muon(keras.optimizers.schedules.CosineDecay(0.1, 10)))


def multi_optimizer() -> Model:
    by_path = keras.optimizers.OptimizerMap(
        keras.optimizers.Adam(), {".*bias": keras.optimizers.SGD(0.1, momentum=0.5)}
    )
    return _functional(layers.Dense(4), optimizer=keras.optimizers.MultiOptimizer(by_path))


def frozen() -> Model:
    middle = layers.Dense(WIDTH)
    model = _functional(layers.Dense(WIDTH), middle, layers.Dense(WIDTH))
    middle.trainable = False
    return _compile(model)


def frozen_before_built() -> Model:
    return _compile(keras.Sequential([layers.Dense(WIDTH), layers.Dense(WIDTH, trainable=False), layers.Dense(WIDTH)]))


def normalized() -> Model:
    norm = layers.Normalization()
    norm.adapt(make_data()[0])
    return _functional(norm)


def custom_layer() -> Model:
    return _functional(Scale(), Scale(), layers.Lambda(lambda x: x * 2.0))


def unregistered_layer() -> Model:
    return _compile(keras.Sequential([layers.Input((WIDTH,)), Shift(), layers.Dense(WIDTH)]))


def unregistered_loss() -> Model:
    return _compile(keras.Sequential([layers.Input((WIDTH,)), layers.Dense(WIDTH)]), loss=double_error)


def with_assets() -> Model:
    return _functional(Vocabulary(("cat", "dog")))


def adapted_by_low_rank() -> Model:
    dense = layers.Dense(WIDTH)
    model = _functional(dense)
    dense.enable_lora(2)
    return _compile(model)


@keras.saving.register_keras_serializable("zoo")
class NamesItsVariables(layers.Layer):
    """A custom layer that saves its variables under names of its own."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.scale = self.add_weight(shape=(input_shape[-1],), initializer="ones", name="scale")
        self.shift = self.add_weight(shape=(input_shape[-1],), initializer="zeros", name="shift")

    def call(self, x: Any) -> Any:  # backend tensors
        return x * self.scale + self.shift

    def save_own_variables(self, store: Any) -> None:  # of Keras
        store["scale"], store["inner/shift"] = self.scale, self.shift

    def load_own_variables(self, store: Any) -> None:  # of Keras
        self.scale.assign(store["scale"])
        self.shift.assign(store["inner/shift"])


@keras.saving.register_keras_serializable("zoo")
class SavesLogarithms(Scale):
    """A custom layer that saves something else than what it holds."""

    def save_own_variables(self, store: Any) -> None:  # of Keras
        store["0"] = keras.ops.log(keras.ops.abs(self.scale))

    def load_own_variables(self, store: Any) -> None:  # of Keras
        self.scale.assign(keras.ops.exp(store["0"]))


@keras.saving.register_keras_serializable("zoo")
class SavesTransposed(layers.Layer):
    """A custom layer that saves what only looks like its variable."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.matrix = self.add_weight(shape=(input_shape[-1], input_shape[-1]), name="matrix")

    def call(self, x: Any) -> Any:  # backend tensors
        return x @ self.matrix

    def save_own_variables(self, store: Any) -> None:  # of Keras
        store["0"] = self.matrix.numpy().T

    def load_own_variables(self, store: Any) -> None:  # of Keras
        self.matrix.assign(np.asarray(store["0"]).T)


def names_its_variables() -> Model:
    return _functional(NamesItsVariables(), layers.Dense(4))


def saves_logarithms() -> Model:
    return _functional(SavesLogarithms(), layers.Dense(4))


def saves_transposed() -> Model:
    return _functional(SavesTransposed(), layers.Dense(4))


def einsum() -> Model:
    return _functional(
        layers.Reshape((2, 3)), layers.EinsumDense("abc,cd->abd", (2, 4), bias_axes="d"), layers.Flatten()
    )


def quantized() -> Model:
    model = _functional(layers.Dense(8), layers.Dense(4))
    model.quantize("int8")
    return _compile(model)


def empty_layers() -> Model:
    return _functional(layers.Activation("relu"), layers.Dropout(0.1), layers.Flatten())


ZOO: dict[str, Callable[[], Model]] = {
    build.__name__: build
    for build in (
        functional,
        dropout_and_batch_norm,
        sequential_with_input,
        sequential_built_by_fit,
        sequential_without_names_in_order,
        subclassed,
        nested,
        shared,
        recurrent,
        attention,
        embedding,
        mixed_bfloat16,
        moving_average,
        accumulated_gradients,
        scaled_loss,
        scheduled,
        multi_optimizer,
        frozen,
        frozen_before_built,
        normalized,
        custom_layer,
        unregistered_layer,
        unregistered_loss,
        with_assets,
        adapted_by_low_rank,
    )
}
FILES: Mapping[str, Callable[[], Model]] = ZOO | {
    build.__name__: build
    for build in (names_its_variables, saves_logarithms, saves_transposed, einsum, quantized, empty_layers)
}
"""More models whose files are special, or whose directories stock Keras cannot load."""
SPREAD = (
    "dropout_and_batch_norm",
    "sequential_built_by_fit",
    "subclassed",
    "nested",
    "mixed_bfloat16",
    "scaled_loss",
    "frozen_before_built",
    "unregistered_layer",
    "with_assets",
)
"""A third of the zoo, of each kind one. The tests of the others are campaigns."""

CUSTOM_OBJECTS = {"Shift": Shift, "double_error": double_error}


def make_data() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(7)
    return generator.integers(0, 9, (ROWS, WIDTH)).astype("float32"), generator.random((ROWS, WIDTH), "float32")


def make_trained(name: str) -> Model:
    """Builds a model of the zoo and trains it for a few batches."""
    model = ZOO[name]()
    model.fit(*make_data(), batch_size=4, epochs=2, verbose=0)
    return model


def find_vocabularies(model: Model) -> list[Vocabulary]:
    return [layer for layer in model.layers if isinstance(layer, Vocabulary)]


def make_tree(leaves: Sequence[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:  # arrays; nested dicts of them
    tree: dict[str, Any] = {}
    for path, array in leaves:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = array
    return tree
