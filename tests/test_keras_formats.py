"""Files of our callback against those that stock Keras wrote of the same step, in the same run."""

from __future__ import annotations

import errno
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import zoo
from keras_file_reader import assert_same, read_file
from runs import fit, make_data, make_model, read_state
from test_commit import mounted_tmpfs

import offstep
from offstep import ModelCheckpoint, SaveFailed
from offstep._native import crc32c
from offstep.formats import file_manifest

Model = Any  # Keras carries no types
Options = dict[str, Any]  # arguments of Keras

pytestmark = pytest.mark.usefixtures("one_writer")

KINDS: dict[str, Options] = {
    "weights.h5": {"save_weights_only": True},
    "keras": {},
    "h5": {},
}
SPREAD = {
    *("functional", "subclassed", "recurrent", "dropout_and_batch_norm", "mixed_bfloat16", "multi_optimizer"),
    *("scaled_loss", "with_assets", "saves_logarithms", "saves_transposed", "adapted_by_low_rank"),
}
all_files = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SPREAD else (pytest.mark.campaign,)) for name in zoo.FILES]
)
RENDERED = {"adapted_by_low_rank", "saves_logarithms", "saves_transposed"}


def fit_zoo(name: str, callbacks: list[Any]) -> Model:
    keras.utils.clear_session()
    model = zoo.FILES[name]()
    model.fit(*zoo.make_data(), batch_size=4, epochs=2, verbose=0, callbacks=callbacks)
    return model


def make_pairs(directory: Path, kinds: dict[str, Options], **options: Any) -> list[Any]:
    """Ours and stock's, of each kind."""
    return [
        make(directory / f"{who}.{suffix}", **kind, **options)
        for suffix, kind in kinds.items()
        for who, make in (("ours", ModelCheckpoint), ("stock", keras.callbacks.ModelCheckpoint))
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trains a model of the zoo, once, with all callbacks at once."""
    directories: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in directories:
            directories[name] = tmp_path_factory.mktemp(name)
            with warnings.catch_warnings():  # the notes are for other tests
                warnings.simplefilter("ignore")
                checked = ModelCheckpoint(
                    directories[name] / "checked.weights.h5", save_weights_only=True, hdf5_checksums=True
                )
                pairs = make_pairs(directories[name], {k: o for k, o in KINDS.items() if k != "h5"})
                fit_zoo(name, [*pairs, checked])
        return directories[name]

    return save


@all_files
def test_every_dataset_and_attribute_is_that_of_stock_keras(name: str, saved: Callable[[str], Path]) -> None:
    directory = saved(name)
    for suffix in ("weights.h5", "keras"):
        assert_same(read_file(directory / f"ours.{suffix}"), read_file(directory / f"stock.{suffix}"))
    checked = directory / "checked.weights.h5"
    assert_same(read_file(checked), read_file(directory / "stock.weights.h5"))
    assert list_unchecked(checked) == []
    assert offstep.verify(checked).ok


def list_unchecked(path: Path) -> list[str]:
    """Returns the datasets whose values have no checksum of HDF5."""
    found = []

    def visit(name: str, node: Any) -> None:  # a group or dataset of h5py
        if isinstance(node, h5py.Dataset) and node.size and not node.fletcher32:
            is_in_header = node.id.get_create_plist().get_layout() == h5py.h5d.COMPACT
            found.extend([] if is_in_header else [name])

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


@pytest.mark.parametrize("name", ["functional", "saves_logarithms"])  # by the writer, and by Keras
def test_stock_keras_refuses_flipped_bits_in_a_file_with_checksums(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "damaged.weights.h5"
    path.write_bytes((saved(name) / "checked.weights.h5").read_bytes())
    model = fit_zoo(name, [])
    model.load_weights(path)
    with h5py.File(path) as file:
        place = file["layers/dense/vars/0"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras guesses at another cause
        with pytest.raises(ValueError, match="could not be loaded"):
            model.load_weights(path)


def test_hdf5_checksums_are_for_weights_files() -> None:
    with pytest.raises(ValueError, match=r"hdf5_checksums are for .weights.h5.* Received: filepath=a.keras"):
        ModelCheckpoint("a.keras", hdf5_checksums=True)


@pytest.mark.parametrize("name", ["functional", "subclassed", "scaled_loss", "saves_logarithms"])
def test_a_legacy_file_is_that_of_stock_keras(name: str, tmp_path: Path) -> None:
    with expected_note("h5"):
        fit_zoo(name, make_pairs(tmp_path, {"h5": {}}))
    assert_same(read_file(tmp_path / "ours.h5"), read_file(tmp_path / "stock.h5"))


@all_files
def test_loaded_models_have_equal_states_and_predictions(name: str, saved: Callable[[str], Path]) -> None:
    directory = saved(name)
    states, predictions = [], []
    for who in ("ours", "stock"):
        keras.utils.clear_session()
        options = {"custom_objects": zoo.CUSTOM_OBJECTS, "safe_mode": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = keras.saving.load_model(directory / f"{who}.keras", **options)
            model.load_weights(directory / f"{who}.weights.h5")
        states.append({path: array.tobytes() for path, array in read_state(model).items() if "seed" not in path})
        predictions.append(np.asarray(model.predict(zoo.make_data()[0], verbose=0)).tobytes())
    assert states[0] == states[1]
    assert predictions[0] == predictions[1]


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("options", [{"snapshot_mode": "device_copy"}, {"in_process": True}], ids=str)
def test_files_are_the_same_whichever_way_they_are_taken(suffix: str, options: Options, tmp_path: Path) -> None:
    stock = keras.callbacks.ModelCheckpoint(tmp_path / f"stock.{suffix}", **KINDS[suffix])
    with expected_note(suffix):
        fit(make_model(), [ModelCheckpoint(tmp_path / f"ours.{suffix}", **KINDS[suffix], **options), stock])
    assert_same(read_file(tmp_path / f"ours.{suffix}"), read_file(tmp_path / f"stock.{suffix}"))


def expected_note(suffix: str) -> AbstractContextManager[None]:
    return expected_warning("Keras itself writes each file, .* legacy format") if suffix == "h5" else nullcontext()


@contextmanager
def expected_warning(text: str) -> Iterator[None]:
    with pytest.warns(UserWarning, match=text), warnings.catch_warnings():  # noqa: PT031
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # of stock Keras, which makes arrays of its variables
        yield


class Synchronous(keras.callbacks.Callback):
    """Makes Keras wait for each batch, as most callbacks with a batch hook do."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        pass


@pytest.mark.parametrize(
    ("suffix", "beside"),
    [
        *((suffix, []) for suffix in KINDS),
        ("keras", [Synchronous]),
        *(pytest.param(suffix, [Synchronous], marks=pytest.mark.campaign) for suffix in KINDS if suffix != "keras"),
    ],
)
def test_a_file_for_every_few_batches_is_that_of_stock_keras(suffix: str, beside: list[type], tmp_path: Path) -> None:
    template = f"{{epoch}}-{{batch}}.{suffix}"
    others = [make() for make in beside]
    fit(
        make_model(),
        [*others, keras.callbacks.ModelCheckpoint(tmp_path / "stock" / template, save_freq=3, **KINDS[suffix])],
    )
    with expected_note(suffix):
        fit(make_model(), [*others, ModelCheckpoint(tmp_path / "ours" / template, save_freq=3, **KINDS[suffix])])
    names = sorted(os.listdir(tmp_path / "stock"))
    assert sorted(os.listdir(tmp_path / "ours")) == names
    assert len(names) == 4
    for name in names:
        assert_same(read_file(tmp_path / "ours" / name), read_file(tmp_path / "stock" / name))


def test_saved_while_training_goes_on_each_file_is_of_one_step(tmp_path: Path) -> None:
    """Thirty saves on their way at once, each rendered by Keras in a thread, while the weights change."""
    keras.utils.clear_session()
    states: dict[int, Any] = {}
    model = zoo.FILES["saves_logarithms"]()
    recorder = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: states.update({epoch + 1: read_state(model)})
    )
    ours = ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True, slots=5)
    with expected_warning("computed by its layer|a layer computes"):
        model.fit(*zoo.make_data(), batch_size=2, epochs=30, verbose=0, callbacks=[recorder, ours])
    for epoch, state in states.items():
        with h5py.File(tmp_path / f"{epoch}.weights.h5") as file:
            kernel = next(
                value for path, value in state.items() if path.startswith("trainable") and value.shape == (zoo.WIDTH, 4)
            )
            assert np.array_equal(file["layers/dense/vars/0"], kernel)
            assert np.array_equal(file["optimizer/vars/0"], epoch * 8)


# --- when Keras has to write -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RENDERED))
def test_a_file_that_only_keras_can_write_is_said_once_and_why(name: str, tmp_path: Path) -> None:
    ours = ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_zoo(name, [ours])
    texts = [str(warning.message) for warning in caught if "Keras" in str(warning.message)]
    assert len(texts) == 1, texts
    is_found_out = name == "saves_transposed"  # a matrix and its transpose look alike until there are values
    assert ("is not what stock Keras writes" in texts[0]) == is_found_out
    assert ("a layer" in texts[0] or "its layer" in texts[0]) == (not is_found_out)


def test_a_plain_model_needs_no_keras_to_write_also_where_warnings_are_errors(tmp_path: Path) -> None:
    model = zoo.make_trained("functional")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        model.fit(
            *zoo.make_data(),
            verbose=0,
            callbacks=[
                ModelCheckpoint(tmp_path / "a.weights.h5", save_weights_only=True),
                ModelCheckpoint(tmp_path / "a.keras"),
            ],
        )
    assert sorted(os.listdir(tmp_path)) == ["a.keras", "a.weights.h5"]


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filepath", "options"),
    [
        ("a.keras", {"save_weights_only": True}),
        ("a.h5", {"save_weights_only": True}),
    ],
)
def test_refused_suffixes_are_refused_in_the_words_of_keras(filepath: str, options: Options) -> None:
    messages = []
    for make in (ModelCheckpoint, keras.callbacks.ModelCheckpoint):
        with pytest.raises(ValueError, match="must end in") as caught:
            make(filepath, **options)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("suffix", KINDS)
def test_a_directory_as_target_is_refused_in_the_words_of_keras(suffix: str, tmp_path: Path) -> None:
    target = tmp_path / f"a.{suffix}"
    target.mkdir()
    expected = (
        f"Please specify a non-directory filepath for ModelCheckpoint. Filepath used is an existing directory: {target}"
    )
    with pytest.raises(OSError, match="Please specify") as caught:
        fit(make_model(), [ModelCheckpoint(target, **KINDS[suffix])])
    assert str(caught.value) == expected
    assert list(target.iterdir()) == []


def test_weights_suffix_without_weights_only_is_a_legacy_model_as_in_keras(tmp_path: Path) -> None:
    stock = keras.callbacks.ModelCheckpoint(tmp_path / "stock.weights.h5")
    with expected_note("h5"):
        fit(make_model(), [ModelCheckpoint(tmp_path / "ours.weights.h5"), stock])
    assert_same(read_file(tmp_path / "ours.weights.h5"), read_file(tmp_path / "stock.weights.h5"))


def test_max_to_keep_counts_the_files_that_this_run_wrote(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()  # not a step, and nothing of ours
    (tmp_path / "older.keras").write_text("of another run")
    fit(make_model(), [ModelCheckpoint(tmp_path / "{epoch}.keras", max_to_keep=2)], epochs=5)
    assert sorted(os.listdir(tmp_path)) == ["1", "4.keras", "5.keras", "older.keras"]


def test_one_file_that_is_overwritten_is_kept_whatever_max_to_keep_is(tmp_path: Path) -> None:
    model = make_model()
    fit(model, [ModelCheckpoint(tmp_path / "best.keras", max_to_keep=1)], epochs=3)
    assert os.listdir(tmp_path) == ["best.keras"]
    keras.utils.clear_session()
    assert int(keras.saving.load_model(tmp_path / "best.keras").optimizer.iterations) == 21


def test_missing_directories_of_a_template_are_made(tmp_path: Path) -> None:
    fit(make_model(), [ModelCheckpoint(tmp_path / "a" / "{epoch}" / "m.keras")])
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.keras")) == [
        "a/1/m.keras",
        "a/2/m.keras",
    ]


def test_a_relative_path_is_that_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(make_model(), [ModelCheckpoint("{epoch}.weights.h5", save_weights_only=True)])
    assert sorted(os.listdir(tmp_path)) == ["1.weights.h5", "2.weights.h5"]


def test_a_recompiled_model_is_saved_with_its_new_config(tmp_path: Path) -> None:
    model = make_model()
    ours = ModelCheckpoint(tmp_path / "{epoch}.keras")
    fit(model, [ours], epochs=1)
    model.compile(keras.optimizers.SGD(0.1), "mae")
    fit(model, [ours], initial_epoch=1, epochs=2)
    optimizers = []
    for epoch in (1, 2):
        with zipfile.ZipFile(tmp_path / f"{epoch}.keras") as archive:
            optimizers.append(json.loads(archive.read("config.json"))["compile_config"]["optimizer"]["class_name"])
    assert optimizers == ["Adam", "SGD"]


def test_a_model_that_keras_cannot_save_fails_the_save(tmp_path: Path) -> None:
    class Unsaveable(keras.layers.Layer):
        def call(self, x: Any) -> Any:  # backend tensors
            return x

        def save_own_variables(self, store: Any) -> None:  # of Keras
            raise ValueError("it is not to be saved")

    inputs = keras.layers.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(1)(Unsaveable()(inputs)))
    model.compile("sgd", "mse")
    with (
        pytest.warns(UserWarning, match=r"Keras itself writes each file.*ValueError"),
        pytest.raises(SaveFailed, match="it is not to be saved"),
    ):
        fit(model, [ModelCheckpoint(tmp_path / "a.weights.h5", save_weights_only=True)], epochs=1)
    left = [name for name in os.listdir(tmp_path) if not name.startswith(".offstep-lock")]  # a run's, while it lives
    assert left == []


def test_a_loop_driven_by_hand_leaves_the_files_of_stock_keras(tmp_path: Path) -> None:
    model = make_model()
    x, y = make_data()
    pairs = make_pairs(tmp_path, {k: o for k, o in KINDS.items() if k != "h5"}, save_freq=2)
    callbacks = keras.callbacks.CallbackList([Synchronous(), *pairs], model=model)
    callbacks.on_train_begin()
    callbacks.on_epoch_begin(0)
    for batch in range(4):
        callbacks.on_train_batch_begin(batch)
        model.train_on_batch(x[:2], y[:2])
        callbacks.on_train_batch_end(batch, {})
    callbacks.on_epoch_end(0, {})
    callbacks.on_train_end()
    for suffix in ("weights.h5", "keras"):
        assert_same(read_file(tmp_path / f"ours.{suffix}"), read_file(tmp_path / f"stock.{suffix}"))


@pytest.mark.parametrize("suffix", KINDS)
def test_a_full_disk_fails_the_save_and_the_older_file_stays(suffix: str, tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "small", "size=400k") as small:
        target = small / f"best.{suffix}"
        with expected_note(suffix):
            fit(make_model(), [ModelCheckpoint(target, **KINDS[suffix])], epochs=1)
        before = target.read_bytes()
        (small / "filler").write_bytes(bytes(400_000 - len(before) - 8192))
        ours = ModelCheckpoint(target, retry_seconds=0, **KINDS[suffix])
        with expected_note(suffix), pytest.raises(SaveFailed, match="No space left on device") as caught:
            fit(make_model(), [ours], epochs=1)
        assert caught.value.errno == errno.ENOSPC
        names = [name for name in os.listdir(small) if not name.startswith(".offstep-lock")]  # a run's, while it lives
        assert sorted(names) == [f"best.{suffix}", "filler"]
        assert target.read_bytes() == before


@pytest.mark.parametrize("suffix", ["keras", "weights.h5"])
def test_a_file_carries_a_manifest_that_stock_keras_does_not_see(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    history = fit(make_model(), [ModelCheckpoint(path, **KINDS[suffix])])
    found = file_manifest.read(path)
    assert found is not None
    assert (found.step, found.epoch, found.batch, found.nonfinite) == (14, 2, None, 0)
    assert found.metrics["loss"] == history.history["loss"][-1]
    record = found.files["model.weights.h5"]
    if suffix == "keras":
        with zipfile.ZipFile(path) as archive:
            assert {member.filename: member.file_size for member in archive.infolist()} == {
                name: record.size for name, record in found.files.items()
            }
    else:
        assert crc32c(path.read_bytes()[: record.size]) == record.crc32c


@pytest.mark.parametrize(
    ("name", "suffix"), [("saves_logarithms", "weights.h5"), ("saves_logarithms", "keras"), ("functional", "h5")]
)
def test_a_file_that_keras_made_carries_a_manifest_that_tells_a_flipped_bit(
    name: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"ours.{suffix}"
    with expected_warning("Keras itself writes each file"):
        model = fit_zoo(name, make_pairs(tmp_path, {suffix: KINDS[suffix]}))
    assert_same(read_file(path), read_file(tmp_path / f"stock.{suffix}"))
    found = file_manifest.read(path)
    assert found is not None
    assert (found.step, found.epoch, found.nonfinite) == (int(model.optimizer.iterations), 2, None)
    report = offstep.verify(path)
    assert report.ok
    assert report.unchecked == ()
    assert report.checked_bytes > 0.9 * (tmp_path / f"stock.{suffix}").stat().st_size
    content = bytearray(path.read_bytes())
    content[content.index(b"\x89HDF") + 2000] ^= 1
    path.write_bytes(content)
    [problem] = offstep.verify(path).problems
    assert problem.where == "model.weights.h5"


@pytest.mark.parametrize("suffix", KINDS)
def test_a_file_of_stock_keras_has_no_manifest(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    fit(make_model(), [keras.callbacks.ModelCheckpoint(path, **KINDS[suffix])])
    assert file_manifest.read(path) is None


@pytest.mark.parametrize("suffix", ["keras", "weights.h5"])
def test_values_that_are_not_finite_are_counted(suffix: str, tmp_path: Path) -> None:
    model = make_model()
    path = tmp_path / f"a.{suffix}"
    spoil = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: model.layers[-1].kernel.assign(np.full((4, 1), np.nan, "float32"))
    )
    fit(model, [spoil, ModelCheckpoint(path, **KINDS[suffix])], epochs=1)
    found = file_manifest.read(path)
    assert found is not None
    assert found.nonfinite == 4


@pytest.mark.parametrize("suffix", ["keras", "weights.h5"])
def test_the_best_of_the_files_of_a_run_is_found_by_their_manifests(suffix: str, tmp_path: Path) -> None:
    history = fit(make_model(), [ModelCheckpoint(tmp_path / f"{{epoch}}.{suffix}", **KINDS[suffix])], epochs=4)
    losses = history.history["loss"]
    for mode, pick in (("min", min), ("max", max)):
        expected = losses.index(pick(losses)) + 1
        assert offstep.best(tmp_path, "loss", mode=mode) == tmp_path / f"{expected}.{suffix}"
