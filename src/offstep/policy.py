"""When to save, what counts as better, and where it goes: pure decisions."""

from __future__ import annotations

import glob
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from string import Formatter
from typing import Literal

TargetKind = Literal["steps", "single"]
FrequencyUnit = Literal["epochs", "batches", "seconds"]

STEP_FIELD = "{step}"

# Suffixes are matched in this order: ".weights.h5" also ends with ".h5".
_FORMAT_BY_SUFFIX = {
    ".weights.h5": "keras_weights",
    ".keras": "keras_archive",
    ".h5": "keras_legacy",
}

_FREQUENCY = re.compile(
    r"(?P<count>\d{1,12}(\.\d{1,9})?)\s*"
    r"((?P<epochs>epochs?)|(?P<batches>batch(es)?)|(?P<s>s|sec|seconds?)|(?P<min>min|minutes?)|(?P<h>h|hours?))",
    re.ASCII,
)
_SECONDS = {"s": 1, "min": 60, "h": 3600}

# https://docs.python.org/3/library/string.html#format-specification-mini-language, numbers only. Widths have at most
# three digits: no file name is longer, and a wider one would only cost memory.
_NUMBER_FORMAT = re.compile(r"([^{}/\\\0]?[<>=^])?[-+ ]?z?#?0?\d{0,3}[_,]?(\.\d{1,3})?[bdoxXeEfFgGn%]?")


@dataclass(frozen=True)
class SaveFrequency:
    """Every how many epochs, batches or seconds to save."""

    count: float
    unit: FrequencyUnit


def parse_seconds(time: str | float, name: str) -> float:
    """Returns the seconds of `"30s"`, `"10min"`, `"2h"` or a number.

    Raises:
        ValueError: it is neither; `name` is the argument that the user has given.
    """
    if isinstance(time, (int, float)) and not isinstance(time, bool) and 0 <= time < math.inf:
        return float(time)
    found = _parse_frequency(time) if isinstance(time, str) else None
    if found is None or found.unit != "seconds":
        raise ValueError(f"{name} must be seconds, or a time such as '30s', '10min' or '2h'. Received: {time!r}")
    return found.count


def parse_save_freq(save_freq: str | int) -> SaveFrequency:
    """Returns what a `save_freq` asks for.

    Keras knows `"epoch"` and a number of batches. Beyond these: `"5 epochs"`, `"500 batches"`, and a time, `"30s"`,
    `"10min"`, `"1.5 h"`.

    Raises:
        ValueError: it is none of these, or zero or less. The text begins with Keras's.
    """
    if save_freq == "epoch":
        return SaveFrequency(1, "epochs")
    if isinstance(save_freq, int):
        if save_freq < 1:
            raise ValueError(f"save_freq must be 'epoch' or at least 1 batch. Received: save_freq={save_freq!r}")
        return SaveFrequency(int(save_freq), "batches")
    frequency = _parse_frequency(save_freq) if isinstance(save_freq, str) else None
    if frequency is None:
        raise ValueError(
            f"Unrecognized save_freq: {save_freq}. Expected save_freq are 'epoch' or integer values, a number of "
            f"epochs or batches such as '5 epochs', or a time such as '30s', '10min' or '2h'. "
            f"Received: save_freq={save_freq!r}"
        )
    return frequency


def _parse_frequency(text: str) -> SaveFrequency | None:
    match = _FREQUENCY.fullmatch(text.strip())
    if match is None or float(match["count"]) == 0:
        return None
    for name, seconds in _SECONDS.items():
        if match[name]:
            return SaveFrequency(float(match["count"]) * seconds, "seconds")
    if not match["count"].isdecimal():
        return None
    return SaveFrequency(int(match["count"]), "epochs" if match["epochs"] else "batches")


class Schedule:
    """Says when a save is due for the frequencies that Keras does not have: several epochs, or a time.

    Epochs are counted as Keras counts batches: from one `fit` to the next, whatever their numbers. Time runs from the
    first `begin` on, or from when a save was last due, between two `fit`s too; a save is due at the end of the first
    batch after it has passed.

    Example:
        >>> now = iter([0.0, 29.0, 31.0, 60.0, 61.0])
        >>> schedule = Schedule(SaveFrequency(30, "seconds"), clock=lambda: next(now))
        >>> schedule.begin()
        >>> [schedule.is_due_after_batch() for _ in range(4)]
        [False, True, False, True]

    Args:
        frequency: How often.
        clock: Returns seconds and never goes back.
    """

    def __init__(self, frequency: SaveFrequency, clock: Callable[[], float]) -> None:
        self._frequency = frequency
        self._clock = clock
        self._since: float | None = None
        self._passed_seconds = 0.0
        self._epochs = 0

    def left(self) -> SaveFrequency:
        """Returns how many epochs, or seconds at the end of the last batch, were left until a save is due."""
        passed = self._passed_seconds if self._frequency.unit == "seconds" else self._epochs
        return SaveFrequency(self._frequency.count - passed, self._frequency.unit)

    def begin(self) -> None:
        """Starts the time, unless it runs."""
        if self._since is None and self._frequency.unit == "seconds":
            self._since = self._clock()

    def is_due_after_batch(self) -> bool:
        """Returns whether the time has passed; if so it starts again."""
        if self._frequency.unit != "seconds":
            return False
        self.begin()
        now = self._clock()
        self._passed_seconds = 0.0 if self._since is None else now - self._since
        if self._passed_seconds < self._frequency.count:
            return False
        self._since, self._passed_seconds = now, 0.0
        return True

    def is_due_after_epoch(self) -> bool:
        """Counts an epoch, and returns whether it is one to save after."""
        if self._frequency.unit != "epochs":
            return False
        self._epochs += 1
        if self._epochs < self._frequency.count:
            return False
        self._epochs = 0
        return True


def lasts_for(left: SaveFrequency, *, epochs: int | None, batches: int | None) -> bool | None:
    """Returns whether a training lasts for what is `left` until a save is due; `None` when that is not known.

    Args:
        left: Epochs, batches or seconds.
        epochs: Those of the training, at most; `None` when nobody knows.
        batches: Those of an epoch, likewise.
    """
    if epochs is None or left.unit == "seconds":
        return None
    if left.unit == "epochs":
        return left.count <= epochs
    return None if batches is None else left.count <= epochs * batches


class Approach:
    """Says whether a metric comes so much nearer to what it has to beat that the next value may beat it.

    Example:
        >>> approach = Approach()
        >>> [approach.note(gap) for gap in (5.0, 4.0, 1.5)]
        [False, False, True]
    """

    def __init__(self) -> None:
        self._gap = math.inf

    def note(self, gap: float) -> bool:
        """Takes how far a value was from being better; once more as good a step would be enough."""
        before, self._gap = self._gap, gap
        return math.isfinite(before) and gap <= before - gap


def is_improvement(current: float, best: float | None, *, mode: Literal["min", "max"], min_delta: float = 0.0) -> bool:
    """Returns whether `current` is better than `best` by more than `min_delta`.

    A `current` that is NaN or infinite is never better; a `best` of `None` or NaN is no best yet.
    """
    if not math.isfinite(current):
        return False
    if best is None or math.isnan(best):
        return True
    if mode == "min":
        return current + abs(min_delta) < best
    return current - abs(min_delta) > best


@dataclass(frozen=True)
class _Piece:
    """Constant text, then the field that follows it, if any."""

    text: str
    field: str | None
    spec: str


class Template:
    """A file name with fields to fill in, as `keras.callbacks.ModelCheckpoint` takes it, checked at construction.

    A field is a plain name with a number format: `{epoch:03d}`, `{val_loss:.2f}`, `{dense/acc}`. Attribute, index
    and conversion access, positional fields and nested formats are refused.

    Example:
        >>> Template("ckpts/{epoch:03d}-{val_loss:.2f}").format({"epoch": 4, "val_loss": 0.125})
        'ckpts/004-0.12'

    Args:
        text: The template.
        filepath: What messages quote in place of `text`, where `text` is only a part of what the user gave.

    Raises:
        ValueError: `text` is empty or malformed, or has a field that is not allowed.
    """

    def __init__(self, text: str, *, filepath: str | None = None) -> None:
        self.text = text
        self.filepath = text if filepath is None else filepath
        self._pieces = _parse(text, self.filepath)

    def __repr__(self) -> str:
        return f"Template({self.text!r})"

    @property
    def fields(self) -> frozenset[str]:
        """Names of all fields."""
        return frozenset(piece.field for piece in self._pieces if piece.field is not None)

    @property
    def pattern(self) -> str:
        """What `glob` finds the names with."""
        pieces = ((glob.escape(piece.text), "" if piece.field is None else "*") for piece in self._pieces)
        return "".join(itertools.chain.from_iterable(pieces))

    def format(self, values: Mapping[str, object]) -> str:
        """Returns the name with `values` (numbers, or arrays of rank 0) filled in.

        Raises:
            KeyError: a field has no value; the text is Keras's.
            ValueError: a value is not a number, its format does not suit it, or the name would leave the directory.
        """
        return "".join(
            piece.text if piece.field is None else piece.text + self._fill(piece.field, piece.spec, values)
            for piece in self._pieces
        )

    def _fill(self, field: str, spec: str, values: Mapping[str, object]) -> str:
        try:
            value = values[field]
        except KeyError as error:
            raise KeyError(self._failed(str(error))) from error
        if not _is_number(value):
            raise ValueError(self._failed(f"{field!r} must be a number, got {type(value).__name__} {value!r}"))
        try:
            filled = format(value, spec)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(self._failed(f"{field!r} with value {value!r}: {error}")) from error
        if re.search(r"[/\\\0]|^\.*$", filled):
            raise ValueError(self._failed(f"{field!r} becomes {filled!r}, which would leave the directory"))
        return filled

    def _failed(self, reason: str) -> str:
        return f'Failed to format this callback filepath: "{self.filepath}". Reason: {reason}'


def split_target(template: Template) -> tuple[Template, TargetKind]:
    """Returns the root of the steps for an Orbax directory, and whether it holds many steps or one.

    `ckpts/{step}` is the root `ckpts` with its `"steps"`. Any other template is itself a root, of a `"single"` step
    that each save replaces. Either way a checkpoint is `<root>/<step>`, which is what stock readers want to find.
    """
    text = template.text.rstrip("/") or "/"
    parent, _, last = text.rpartition("/")
    if last != STEP_FIELD:
        return Template(text, filepath=template.filepath), "single"
    root = parent or ("/" if text.startswith("/") else ".")
    return Template(root, filepath=template.filepath), "steps"


def format_of(filepath: str, *, weights_only: bool = True) -> str:
    """Returns the name of the format that `filepath` asks for by its suffix; what is no Keras file is a directory.

    Without `weights_only`, `.weights.h5` is a whole model in the legacy format, as it is to stock Keras.
    """
    for suffix, name in _FORMAT_BY_SUFFIX.items():
        if filepath.endswith(suffix):
            return "keras_legacy" if name == "keras_weights" and not weights_only else name
    return "orbax_directory"


def _parse(text: str, filepath: str) -> tuple[_Piece, ...]:
    if not text or "\0" in text:
        raise ValueError(f"The filepath must be a non-empty string without null characters. Received: {filepath=!s}")
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"The filepath is not a valid template: {error}. Received: {filepath=!s}") from error
    for _, field, spec, conversion in parts:
        fault = None if field is None else _find_fault(field, spec or "", conversion)
        if fault is not None:
            raise ValueError(
                f"The filepath may hold plain field names with a number format only, as in '{{epoch:03d}}'; "
                f"{fault}. Received: {filepath=!s}"
            )
    return tuple(_Piece(literal, field, spec or "") for literal, field, spec, _ in parts)


def _find_fault(field: str, spec: str, conversion: str | None) -> str | None:
    if not field or field.isdecimal():
        return f"field '{{{field}}}' is positional"
    if re.search(r"[.\[\]]", field):
        return f"field '{{{field}}}' reaches into its value"
    if conversion is not None:
        return f"field '{{{field}}}' has a conversion '!{conversion}'"
    if not _NUMBER_FORMAT.fullmatch(spec):
        return f"field '{{{field}}}' has the format '{spec}', which is not one for numbers"
    return None


def _is_number(value: object) -> bool:
    if isinstance(value, Real):
        return True
    # NumPy and JAX arrays of rank 0, recognised without importing either; their dtype may still be text.
    if getattr(value, "ndim", None) != 0:
        return False
    try:
        float(value)  # type: ignore[arg-type]  # any object; TypeError is an answer here
    except (TypeError, ValueError):
        return False
    return True
