"""The position of a `fit` in its data, and the way back to it.

Keras has no word for either: private attributes of its epoch iterator are followed and changed here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from offstep import fields, keras_random
from offstep.attachments import Value, is_packable

Model = Any  # Keras carries no types


def is_known(iterator: object) -> bool:
    """Returns whether Keras's epoch iterator has what a `DataPosition` needs."""
    names = ("_enumerate_iterator", "_current_iterator", "_get_iterator", "_steps_seen", "data_adapter")
    return all(hasattr(iterator, name) for name in names)


@dataclass(frozen=True)
class Skip:
    """What of the data has been trained on already.

    Attributes:
        start: What `DataPosition.read_start` returned when the pass over the data began.
        drawn_before: Batches of the pass that earlier epochs took.
        last_batch: The last batch of the epoch that was trained, from 0; `None` when none was.
        source: State of an iterator that can be put back, else `None`.
    """

    start: Value
    drawn_before: int
    last_batch: int | None
    source: Value = None


class DataPosition:
    """Follows the batches that a `fit` draws, and lets its next epoch begin in the middle.

    A *pass* is the life of one iterator over the data: an epoch, unless `steps_per_epoch` lets it span several.
    """

    def __init__(self, model: Model, iterator: Any) -> None:  # keras's EpochIterator
        self._model = model
        self._iterator = iterator
        self._enumerate_all = iterator._enumerate_iterator
        iterator._enumerate_iterator = self._enumerate
        self._source: Any = None  # what yields the batches of the running epoch
        self._skip: Skip | None = None
        self._may_stay_unread = False  # whether batches that are skipped need not be read
        self.logs: dict[str, Any] = {}  # what the training step that is skipped returns
        self._baseline = fields.copy_fields(self._read_dataset())
        self._sample = {} if self._dataset is None else fields.sample_data(self._dataset)

    def release(self) -> None:
        """Lets Keras's iterator go on by itself."""
        self._iterator.__dict__.pop("_enumerate_iterator", None)

    @property
    def kind(self) -> str:
        """Keras's name for the kind of data."""
        return type(self._iterator.data_adapter).__name__

    @property
    def batch_count(self) -> int | None:
        """Batches of an epoch, as far as they are known."""
        count: int | None = self._iterator.num_batches
        return count

    @property
    def drawn_before(self) -> int:
        """How many batches of the current pass have been drawn, between two epochs; 0 when a new pass begins."""
        iterator = self._iterator
        if iterator._current_iterator is None or iterator.steps_per_epoch is None:
            return 0
        return int(iterator._steps_seen)

    # ----------------------------------------------------------------------------------------------- the dataset

    @property
    def _dataset(self) -> Any:  # of keras.utils.PyDataset, or None
        return getattr(self._iterator.data_adapter, "py_dataset", None)

    def read_start(self) -> Value:
        """Returns what the order of the data follows from; before a pass begins."""
        return {"random": keras_random.read_random_states(), "dataset": self.read_dataset()}

    def read_dataset(self) -> Value:
        """Returns the state of a `PyDataset`: its own `get_state`, or those of its plain fields that have changed."""
        dataset = self._dataset
        if callable(getattr(dataset, "get_state", None)):
            return {"own": dataset.get_state()}
        return {"fields": fields.copy_fields(fields.select_changed(self._read_dataset(), self._baseline))}

    def write_dataset(self, state: Value) -> None:
        """Puts back what `read_dataset` returned."""
        if "own" in state:
            self._dataset.set_state(state["own"])
        elif self._dataset is not None:
            # Copies, because the dataset may go on to change them in place.
            fields.write_fields(self._dataset, fields.copy_fields(self._baseline | state["fields"]))

    def _read_dataset(self) -> fields.Fields:
        return {} if self._dataset is None else fields.read_fields(self._dataset)

    def read_source(self) -> Value:
        """Returns the state of the iterator itself where it tells it (Grain), else `None`."""
        state = self._source.get_state() if _is_seekable(self._source) else None
        return state if is_packable(state) else None

    def find_doubt(self) -> str | None:
        """Says why the position cannot be put back exactly; `None` when it can."""
        if self.kind in ("ArrayDataAdapter", "GrainDatasetAdapter"):
            return None
        if self._dataset is None:
            name = "a generator" if self.kind == "GeneratorDataAdapter" else f"the data of a {self.kind}"
            return f"{name} is brought to its position by drawing and dropping what was trained already"
        return self._find_doubt_in_dataset()

    def _find_doubt_in_dataset(self) -> str | None:
        if self._iterator.data_adapter.enqueuer is not None:
            return "Keras's workers read ahead of the training and keep batches for the next epoch"
        if callable(getattr(self._dataset, "get_state", None)):
            return None
        name = type(self._dataset).__name__
        if fields.sample_data(self._dataset) != self._sample:
            return f"{name} changes an array of more than {fields.MOST_BYTES >> 20} MiB in place"
        opaque = fields.find_opaque(self._dataset)
        return f"{name}.{opaque[0]} may hold state that cannot be seen" if opaque else None

    # ---------------------------------------------------------------------------------------------- the position

    def begin_with(self, skip: Skip) -> None:
        """Lets the next epoch begin behind what is skipped; right before Keras iterates over it.

        Keras needs one turn of its loop for each epoch, so the last batch that was trained comes once more, without
        its training step: callbacks hear of it, the model does not change.
        """
        self._skip = skip
        self._may_stay_unread = self._dataset is not None and self.find_doubt() is None

    def _enumerate(self) -> Iterator[tuple[int, int, Any]]:
        skip, self._skip = self._skip, None
        if skip is not None and skip.drawn_before:
            self._continue_pass(skip)
        for begin, end, source in self._enumerate_all():
            self._source = source
            if skip is not None and skip.last_batch is not None and end <= skip.last_batch:
                if skip.source is None:
                    self._drop(source, self._iterator.steps_per_execution)
                if end < skip.last_batch:
                    continue
                if skip.source is not None:
                    source.set_state(skip.source)
                self._skip_training_step(source)
            yield begin, end, source

    def _continue_pass(self, skip: Skip) -> None:
        """Makes the iterator of a pass that began in an earlier epoch."""
        states = keras_random.read_random_states()
        keras_random.write_random_states(skip.start["random"])
        self.write_dataset(skip.start["dataset"])
        iterator = self._iterator
        iterator._current_iterator = iter(iterator._get_iterator())
        if skip.source is None:
            self._drop(iterator._current_iterator, skip.drawn_before)
        else:
            iterator._current_iterator.set_state(skip.source)
        iterator._steps_seen = skip.drawn_before
        keras_random.write_random_states(states)

    def _drop(self, source: Iterator[Any], count: int) -> None:
        adapter, dataset = self._iterator.data_adapter, self._dataset
        if self._may_stay_unread:
            adapter.py_dataset = _Blank(dataset)
        try:
            for _ in range(count):
                next(source, None)
        finally:
            if self._may_stay_unread:
                adapter.py_dataset = dataset

    def _skip_training_step(self, source: object) -> None:
        """Lets the next training step on `source` do nothing."""
        model, train = self._model, self._model.train_function

        def skip(state: Any, iterator: Any) -> Any:  # as Keras's train function
            model.train_function = train
            # Otherwise another `fit` has come before it.
            return (self.logs, state) if iterator is source else train(state, iterator)

        model.train_function = skip


class _Blank:
    """Stands in for a dataset while its batches are skipped: reading them would take as long as training."""

    def __init__(self, dataset: Any) -> None:
        self.num_batches = dataset.num_batches

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {}  # a batch without arrays


def _is_seekable(source: object) -> bool:
    return callable(getattr(source, "get_state", None)) and callable(getattr(source, "set_state", None))
