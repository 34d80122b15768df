"""The decisions of `keras.callbacks.ModelCheckpoint`, without Keras."""

from __future__ import annotations

import re
from typing import Any, Literal

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offstep.policy import (
    Approach,
    FrequencyUnit,
    SaveFrequency,
    Schedule,
    TargetKind,
    Template,
    format_of,
    is_improvement,
    lasts_for,
    parse_save_freq,
    split_target,
)

Mode = Literal["min", "max"]


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize("current", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("best", [None, 1.0])
def test_non_finite_metric_is_never_best(current: float, mode: Mode, best: float | None) -> None:
    assert not is_improvement(current, best, mode=mode)


@pytest.mark.parametrize("best", [None, float("nan")])
def test_first_finite_metric_is_best(best: float | None) -> None:
    assert is_improvement(5.0, best, mode="min")


@pytest.mark.parametrize(("mode", "best"), [("min", float("inf")), ("max", float("-inf"))])
def test_infinite_threshold_lets_the_first_metric_through(mode: Mode, best: float | None) -> None:
    assert is_improvement(5.0, best, mode=mode)


def test_equal_metric_is_no_improvement() -> None:
    assert not is_improvement(1.0, 1.0, mode="min")
    assert not is_improvement(1.0, 1.0, mode="max")


def test_improvement_must_exceed_min_delta() -> None:
    assert not is_improvement(0.75, 1.0, mode="min", min_delta=0.25)
    assert is_improvement(0.5, 1.0, mode="min", min_delta=0.25)
    assert not is_improvement(1.25, 1.0, mode="max", min_delta=0.25)
    assert is_improvement(1.5, 1.0, mode="max", min_delta=0.25)


@given(
    text=st.sampled_from(
        ["{epoch:03d}-{val_loss:.2f}", "{epoch}", "a{{b}}{val_loss:+.3e}", "{epoch:>8}", "{val_loss:_.1f}.keras"]
    ),
    epoch=st.integers(0, 10**6),
    val_loss=st.floats(),
)
def test_names_are_those_of_str_format(text: str, epoch: int, val_loss: float) -> None:
    values = {"epoch": epoch, "val_loss": val_loss}
    assert Template(text).format(values) == text.format(**values)


@pytest.mark.parametrize("name", ["dense/acc", "my metric", "päivä", "a-b", "a=b"])
def test_odd_metric_names_are_fields(name: str) -> None:
    template = Template(f"{{epoch}}-{{{name}:.2f}}")
    assert template.fields == {"epoch", name}
    assert template.format({"epoch": 3, name: 0.5}) == "3-0.50"


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), np.int64(2), True, np.float64("nan")])
def test_scalars_are_formatted_as_they_format_themselves(value: object) -> None:
    assert Template("{x}").format({"x": value}) == f"{value}"


@pytest.mark.parametrize(
    ("text", "field", "reason"),
    [
        ("{epoch.__class__}", "{epoch.__class__}", "reaches into its value"),
        ("{a[0]}", "{a[0]}", "reaches into its value"),
        ("{x!r}", "{x}", "has a conversion '!r'"),
        ("{x!s:>4}", "{x}", "has a conversion '!s'"),
        ("{x:{width}}", "{x}", "has the format '{width}', which is not one for numbers"),
        ("{x:s}", "{x}", "has the format 's', which is not one for numbers"),
        ("{x:c}", "{x}", "has the format 'c', which is not one for numbers"),
        ("{x:%Y}", "{x}", "has the format '%Y', which is not one for numbers"),
        ("{x:9999999999d}", "{x}", "has the format '9999999999d', which is not one for numbers"),
        ("{x:/>9}", "{x}", "has the format '/>9', which is not one for numbers"),
        ("{}", "{}", "is positional"),
        ("{0}", "{0}", "is positional"),
    ],
)
def test_field_that_is_not_plain_is_refused_at_construction(text: str, field: str, reason: str) -> None:
    message = (
        "The filepath may hold plain field names with a number format only, as in '{epoch:03d}'; "
        f"field '{field}' {reason}. Received: filepath=ckpts/{text}"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        Template(f"ckpts/{text}")


@pytest.mark.parametrize("text", ["{epoch", "epoch}", "{a/{step}", "{x!}"])
def test_malformed_template_is_refused_at_construction(text: str) -> None:
    ending = re.escape(f". Received: filepath={text}")
    with pytest.raises(ValueError, match=rf"^The filepath is not a valid template: .*{ending}$"):
        Template(text)


@pytest.mark.parametrize("text", ["", "a\0b"])
def test_filepath_that_cannot_exist_is_refused(text: str) -> None:
    message = f"The filepath must be a non-empty string without null characters. Received: filepath={text}"
    with pytest.raises(ValueError, match=exactly(message)):
        Template(text)


def test_missing_field_is_reported_in_the_words_of_keras() -> None:
    stock = keras.callbacks.ModelCheckpoint("m-{epoch}-{val_loss:.2f}.keras")
    with pytest.raises(KeyError) as expected:
        stock._get_file_path(0, None, {})

    with pytest.raises(KeyError) as error:
        Template("m-{epoch}-{val_loss:.2f}.keras").format({"epoch": 1})

    assert error.value.args == expected.value.args


@pytest.mark.parametrize("value", ["../../etc/passwd", "a/b", "..", "1.5", None, [1], np.zeros(2), np.array("..")])
def test_value_that_is_not_a_number_is_refused(value: object) -> None:
    message = (
        'Failed to format this callback filepath: "ckpts/{loss}". '
        f"Reason: 'loss' must be a number, got {type(value).__name__} {value!r}"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        Template("ckpts/{loss}").format({"loss": value})


def test_number_that_writes_itself_as_a_path_is_refused() -> None:
    class Traversal(float):
        def __format__(self, spec: str) -> str:
            return "../x"

    with pytest.raises(ValueError, match=r"'loss' becomes '\.\./x', which would leave the directory$"):
        Template("ckpts/{loss}").format({"loss": Traversal(1)})


def test_format_that_does_not_suit_the_value_names_field_and_value() -> None:
    message = (
        'Failed to format this callback filepath: "{loss:03d}". '
        "Reason: 'loss' with value 0.5: Unknown format code 'd' for object of type 'float'"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        Template("{loss:03d}").format({"loss": 0.5})


@pytest.mark.parametrize(
    ("filepath", "root", "kind"),
    [
        ("ckpts/{step}", "ckpts", "steps"),
        ("ckpts/{step}/", "ckpts", "steps"),
        ("/{step}", "/", "steps"),
        ("{step}", ".", "steps"),
        ("run-{epoch}/{step}", "run-{epoch}", "steps"),
        ("gs://bucket/{step}", "gs://bucket", "steps"),
        ("ckpts/best", "ckpts/best", "single"),
        ("ckpts/best/", "ckpts/best", "single"),
        ("ckpts/{epoch:02d}-{val_loss:.2f}", "ckpts/{epoch:02d}-{val_loss:.2f}", "single"),
        ("ckpts/{step:06d}", "ckpts/{step:06d}", "single"),
        ("ckpts/at-{step}", "ckpts/at-{step}", "single"),
        ("ckpts/{{step}}", "ckpts/{{step}}", "single"),
        ("{dense/acc}", "{dense/acc}", "single"),
        ("/", "/", "single"),
    ],
)
def test_root_and_kind_follow_from_the_last_part(filepath: str, root: str, kind: TargetKind) -> None:
    template, found = split_target(Template(filepath))
    assert (template.text, found) == (root, kind)


def test_root_quotes_the_filepath_that_the_user_gave() -> None:
    root, _ = split_target(Template("run-{seed}/{step}"))
    with pytest.raises(KeyError, match=r'filepath: "run-\{seed\}/\{step\}"'):
        root.format({"step": 1})


@pytest.mark.parametrize(
    ("filepath", "name"),
    [
        ("a/m.weights.h5", "keras_weights"),
        ("a/m-{epoch}.keras", "keras_archive"),
        ("m.h5", "keras_legacy"),
        ("ckpts/{step}", "orbax_directory"),
        ("ckpts/best", "orbax_directory"),
        ("m.keras/{step}", "orbax_directory"),
        ("m.KERAS", "orbax_directory"),
    ],
)
def test_format_follows_from_the_suffix(filepath: str, name: str) -> None:
    assert format_of(filepath) == name


# ------------------------------------------------------------------------------------------------ how often


@pytest.mark.parametrize(
    ("save_freq", "count", "unit"),
    [
        ("epoch", 1, "epochs"),
        ("1 epoch", 1, "epochs"),
        ("5 epochs", 5, "epochs"),
        ("5epochs", 5, "epochs"),
        (7, 7, "batches"),
        ("1 batch", 1, "batches"),
        ("500 batches", 500, "batches"),
        (" 500  batches ", 500, "batches"),
        ("30s", 30.0, "seconds"),
        ("30 sec", 30.0, "seconds"),
        ("1 second", 1.0, "seconds"),
        ("0.5s", 0.5, "seconds"),
        ("10min", 600.0, "seconds"),
        ("10 minutes", 600.0, "seconds"),
        ("2h", 7200.0, "seconds"),
        ("1.5 hours", 5400.0, "seconds"),
    ],
)
def test_frequency_is_a_number_with_a_unit(save_freq: str | int, count: float, unit: FrequencyUnit) -> None:
    assert parse_save_freq(save_freq) == SaveFrequency(count, unit)


BAD_FREQUENCIES = [
    "", "epochs", "batch", "5", "0 epochs", "0s", "-5 epochs", "1.5 epochs", "5 weeks", "10m", "inf s", "1e3s",
    "10 min 5 s", "5 Epochs", "\u0661 epochs", 1.5, None, [3],
]  # fmt: skip


@pytest.mark.parametrize("save_freq", BAD_FREQUENCIES)
def test_frequency_that_is_none_is_refused_in_the_words_of_keras(save_freq: Any) -> None:
    stock = f"Unrecognized save_freq: {save_freq}. Expected save_freq are 'epoch' or integer values"
    with pytest.raises(ValueError, match=f"^{re.escape(stock)}, .*{re.escape(f'Received: save_freq={save_freq!r}')}$"):
        parse_save_freq(save_freq)


@pytest.mark.parametrize("save_freq", [0, -3])
def test_fewer_batches_than_one_are_refused(save_freq: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1 batch. Received: save_freq={save_freq}$"):
        parse_save_freq(save_freq)


@given(every=st.integers(1, 9), epochs=st.integers(0, 40))
def test_epochs_are_counted_from_one_save_to_the_next(every: int, epochs: int) -> None:
    schedule = Schedule(SaveFrequency(every, "epochs"), clock=lambda: 0.0)
    due = [schedule.is_due_after_epoch() for _ in range(epochs)]
    assert [number for number, is_due in enumerate(due, 1) if is_due] == list(range(every, epochs + 1, every))
    assert not schedule.is_due_after_batch()


@given(every=st.floats(0.5, 100.0), steps=st.lists(st.floats(0.0, 300.0), max_size=40))
def test_a_time_is_due_at_the_first_batch_after_it_has_passed(every: float, steps: list[float]) -> None:
    now = 0.0
    schedule = Schedule(SaveFrequency(every, "seconds"), clock=lambda: now)
    schedule.begin()
    last = now
    for step in steps:
        now += step
        schedule.begin()  # as the next `fit` does
        is_due = schedule.is_due_after_batch()
        assert is_due == (now - last >= every)
        last = now if is_due else last
        assert not schedule.is_due_after_epoch()


# ------------------------------------------------------------------------------------------------ what is to come


@pytest.mark.parametrize(
    ("left", "unit", "epochs", "batches", "lasts"),
    [
        (2, "epochs", 2, None, True),
        (3, "epochs", 2, 9, False),
        (1, "epochs", None, 9, None),
        (18, "batches", 2, 9, True),
        (19, "batches", 2, 9, False),
        (1, "batches", 2, None, None),
        (1, "batches", None, 9, None),
        (1.0, "seconds", 2, 9, None),
    ],
)
def test_a_training_lasts_as_long_as_its_epochs(
    left: float, unit: FrequencyUnit, epochs: int | None, batches: int | None, lasts: bool | None
) -> None:
    assert lasts_for(SaveFrequency(left, unit), epochs=epochs, batches=batches) is lasts


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([1.0], [False]),
        ([4.0, 2.0], [False, True]),
        ([4.0, 2.5, 1.5], [False] * 3),
        ([1.0, 3.0, 1.0], [False, False, True]),
    ],
)
def test_a_metric_approaches_by_as_much_as_is_left(gaps: list[float], expected: list[bool]) -> None:
    approach = Approach()
    assert [approach.note(gap) for gap in gaps] == expected


def test_what_is_left_of_a_schedule() -> None:
    now = 5.0
    epochs, seconds = (Schedule(SaveFrequency(3, unit), clock=lambda: now) for unit in ("epochs", "seconds"))
    epochs.is_due_after_epoch()
    assert epochs.left() == SaveFrequency(2, "epochs")
    seconds.begin()
    now = 7.0
    seconds.is_due_after_batch()
    assert seconds.left() == SaveFrequency(1, "seconds")
    now = 9.0
    assert seconds.is_due_after_batch()
    assert seconds.left() == SaveFrequency(3, "seconds")
