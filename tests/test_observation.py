"""What a run tells of its saves: lines, logs, events, monitoring, and the user's own function."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import pytest
from jax import monitoring
from runs import fit, make_model

from offstep import ModelCheckpoint, SaveStats
from offstep.observation import DURABLE_EVENT, STALL_EVENT


@contextmanager
def expected_warning(text: str) -> Iterator[None]:
    with pytest.warns(RuntimeWarning, match=text), warnings.catch_warnings():  # noqa: PT031
        warnings.simplefilter("always", RuntimeWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # of stock Keras, which makes arrays of its variables
        yield


def read_events(path: Path) -> list[dict[str, Any]]:  # JSON
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_save_is_logged_told_and_monitored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[SaveStats] = []
    durations: list[str] = []

    def listen(name: str, seconds: float, **_: Any) -> None:
        assert seconds > 0
        durations.append(name)

    callback = ModelCheckpoint(
        tmp_path / "ckpts/{step}",
        verbose=2,
        on_durable=seen.append,
        event_log=tmp_path / "logs/offstep-events.jsonl",
        in_process=True,
    )
    csv = tmp_path / "log.csv"
    monitoring.register_event_duration_secs_listener(listen)
    try:
        fit(make_model(), [callback, keras.callbacks.CSVLogger(csv)])
    finally:
        monitoring.unregister_event_duration_listener(listen)
    assert [(stats.step, stats.path) for stats in seen] == [(s, f"{tmp_path}/ckpts/{s}") for s in (7, 14)]
    events = read_events(tmp_path / "logs/offstep-events.jsonl")
    assert [event["step"] for event in events if event["event"] == "snapshot"] == [7, 14]
    assert [event["step"] for event in events if event["event"] == "durable"] == [7, 14]
    assert [event["epoch"] for event in events if event["event"] == "epoch"] == [1, 2]
    assert (events[0]["event"], events[-1]["event"]) == ("begin", "end")
    assert all(event["stall_seconds"] > 0 for event in events if event["event"] in ("snapshot", "epoch"))
    ours = [name for name in durations if name.startswith("/offstep/")]
    assert (ours.count(STALL_EVENT), ours.count(DURABLE_EVENT)) == (2, 2)
    out = capsys.readouterr().out
    assert out.count("finished saving model to") == 2
    assert "offstep: step 14 durable after " in out
    assert "offstep_stall_ms" in csv.read_text().splitlines()[0]


def test_nothing_is_added_unasked(tmp_path: Path) -> None:
    history = fit(make_model(), [ModelCheckpoint(tmp_path / "{step}", verbose=0, in_process=True)], epochs=1)
    assert set(history.history) == {"loss", "mae"}
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


def test_a_failed_save_is_logged(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    callback = ModelCheckpoint(tmp_path / "c/{step}", on_error="warn", event_log=log, in_process=True, retry_seconds=0)

    def obstruct(epoch: int, logs: Any) -> None:
        (tmp_path / "c/7").write_text("in the way")

    with expected_warning("step 7 was not saved"):
        fit(make_model(), [keras.callbacks.LambdaCallback(on_epoch_begin=obstruct), callback], epochs=1)
    [failed] = [event for event in read_events(log) if event["event"] == "failed"]
    assert failed["step"] == 7
    assert failed["error"]


def test_an_error_of_the_users_function_is_raised(tmp_path: Path) -> None:
    def refuse(stats: SaveStats) -> None:
        raise LookupError(f"no room for step {stats.step}")

    callback = ModelCheckpoint(tmp_path / "{step}", on_durable=refuse, in_process=True)
    with pytest.raises(LookupError, match="no room for step 7"):
        fit(make_model(), [callback], epochs=1)
    assert callback.counts.durable == 1


def test_a_log_that_cannot_be_written_ends_aloud(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    callback = ModelCheckpoint(tmp_path / "c/{step}", event_log=tmp_path / "log", in_process=True)
    with expected_warning("no more events are logged: .*Is a directory"):
        fit(make_model(), [callback], epochs=1)
    assert callback.counts.durable == 1


def test_a_callback_with_saves_in_flight_can_be_copied(tmp_path: Path) -> None:
    copies: list[ModelCheckpoint] = []
    callback = ModelCheckpoint(tmp_path / "{step}", save_freq=1, event_log=tmp_path / "log", in_process=True)
    take = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: copies.append(copy.deepcopy(callback)))
    fit(make_model(), [callback, take], epochs=1)
    assert copies[0].counts.requested == 0


def test_what_is_no_function_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"on_durable must be a function .* Received: 'upload'"):
        ModelCheckpoint(tmp_path / "{step}", on_durable="upload")  # type: ignore[arg-type]
