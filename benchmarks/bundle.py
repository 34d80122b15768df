"""How does one Keras layer hold thousands of small weights?"""

from __future__ import annotations

import keras


@keras.saving.register_keras_serializable("offstep_benchmarks")
class DenseBundle(keras.layers.Layer):
    """Many small dense layers side by side, their outputs averaged: many arrays, a shallow graph."""

    def __init__(self, count: int, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.count = count

    def build(self, input_shape: tuple[int, ...]) -> None:
        width = input_shape[-1]
        self.kernels = [self.add_weight(shape=(width, width), name=f"kernel_{i}") for i in range(self.count)]
        self.biases = [self.add_weight(shape=(width,), name=f"bias_{i}") for i in range(self.count)]

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        outputs = [inputs @ kernel + bias for kernel, bias in zip(self.kernels, self.biases, strict=True)]
        return keras.ops.mean(keras.ops.stack(outputs), axis=0)

    def get_config(self) -> dict[str, object]:
        return {**super().get_config(), "count": self.count}
