"""The learning rate in the JSON of a Keras model, which other callbacks change while the writer knows no Keras."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from functools import cache
from typing import Any

import keras
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offstep.formats.model_config import LONGEST_NUMBER, parse_config
from offstep.formats.stored_zip import SMALLEST_PADDING, Member, encode_directory, encode_header

MOMENT = (2026, 1, 2, 3, 4, 6)


def describe(optimizer: Any, **config: Any) -> str:
    compiled = {"optimizer": keras.saving.serialize_keras_object(optimizer)} if optimizer else {}
    return json.dumps({"config": {"name": "päivä", **config}, "compile_config": compiled})


def make_scaled(rate: Any) -> Any:  # an optimizer of Keras
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(rate))


@cache
def describe_once(make: Any) -> str:
    return describe(make(0.25), learning_rate=0.25)


@given(rate=st.floats(0.0, 2.0**90, width=32))
@pytest.mark.parametrize("make", [keras.optimizers.Adam, make_scaled])
def test_the_learning_rate_of_the_moment_is_written_as_keras_writes_it(make: Any, rate: float) -> None:
    text = describe_once(make)
    config = parse_config(text, quotes_rate=True)
    encoded = config.encode(rate)
    assert encoded.decode() == text.replace('"learning_rate": 0.25, "weight', f'"learning_rate": {rate!r}, "weight')
    assert 0 <= config.missing_bytes(encoded) <= LONGEST_NUMBER


@pytest.mark.parametrize(
    ("text", "quotes_rate"),
    [
        (describe(None), True),
        (describe(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 100))), True),
        (describe(keras.optimizers.Adam(0.5)), False),
        (describe(keras.optimizers.Adam(0.5)).replace(": ", ":"), True),  # not as Keras writes it
    ],
)
def test_a_model_that_quotes_no_number_stays_as_it_is(text: str, quotes_rate: bool) -> None:
    config = parse_config(text, quotes_rate=quotes_rate)
    assert config.encode(7.0) == text.encode()
    assert config.missing_bytes(text.encode()) == 0


@pytest.mark.parametrize("padding", [0, SMALLEST_PADDING, 31])
def test_padding_of_a_header_is_skipped_by_readers(padding: int) -> None:
    content = b"{}"
    member = Member("config.json", len(content), zlib.crc32(content), 0, padding=padding)
    front = encode_header(member, MOMENT) + content
    archive = front + encode_directory([member], MOMENT, len(front))
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        assert opened.testzip() is None
        assert opened.read("config.json") == content
    assert len(front) == 30 + len("config.json") + padding + len(content)
