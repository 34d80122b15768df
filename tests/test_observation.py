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
from runs import BATCHES, fit, make_data, make_model

from offstep import BackupAndRestore, ModelCheckpoint, SaveStats
from offstep.event_log import EventLog
from offstep.observation import DURABLE_EVENT, STALL_EVENT, WRITE_EVENT

pytestmark = pytest.mark.usefixtures("one_writer")


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
        if name.startswith("/offstep"):  # of JAX's own, the time that its cache saves may be less than nothing
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
    assert len({event["run"] for event in events}) == 1
    ours = [name for name in durations if name.startswith("/offstep/")]
    assert [ours.count(name) for name in (STALL_EVENT, WRITE_EVENT, DURABLE_EVENT)] == [2, 2, 2]
    out = capsys.readouterr().out
    assert out.count("finished saving model to") == 2
    assert "offstep: step 14 durable after " in out
    assert "offstep_stall_ms" in csv.read_text().splitlines()[0]


@pytest.mark.parametrize("others", [[], [keras.callbacks.TerminateOnNaN()]], ids=["asynchronous", "synchronous"])
def test_every_batch_is_in_the_log(others: list[Any], tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    callback = ModelCheckpoint(tmp_path / "{step}", save_freq=3, event_log=log, in_process=True)
    fit(make_model(), [*others, callback], epochs=2, validation_data=make_data())
    events = read_events(log)
    batches = [event for event in events if event["event"] == "batches"]
    assert sum(event["count"] for event in batches) == 2 * BATCHES
    assert batches[-1]["step"] == 2 * BATCHES
    assert sum(event["count"] for event in batches if event["is_warm_up"]) == 2
    assert all(event["seconds"] >= event["max_seconds"] >= event["median_seconds"] > 0 for event in batches)
    [*before, last] = [(event["began"], event["time"]) for event in batches]
    assert all(began <= ended for began, ended in [*before, last])
    stall = sum(event["stall_seconds"] for event in events if event["event"] == "snapshot")
    assert stall == pytest.approx(sum(stats.stall_seconds for stats in callback.stats), abs=1e-4)


def test_backups_are_logged_too(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    callback = BackupAndRestore(tmp_path / "backup", save_freq=3, event_log=log, in_process=True)
    fit(make_model(), [callback], epochs=1)
    events = read_events(log)
    assert [event["step"] for event in events if event["event"] == "durable"] == [3, 6]
    assert events[-1]["event"] == "end"


def test_the_log_says_what_went_for_each_save(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    fit(make_model(), [ModelCheckpoint(tmp_path / "c/{step}", max_to_keep=1, event_log=log)], epochs=3)
    durable = [event for event in read_events(log) if event["event"] == "durable"]
    assert [event["retired"] for event in durable] == [[], [f"{tmp_path}/c/7"], [f"{tmp_path}/c/14"]]
    assert [event["save"] for event in durable] == [1, 2, 3]
    assert all(0 < event["write_seconds"] <= event["durable_seconds"] for event in durable)
    assert all(event["retire_seconds"] > 0 for event in durable[1:])


@pytest.mark.filterwarnings("ignore:A save was skipped:UserWarning")
def test_a_save_that_is_skipped_is_logged(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    callback = ModelCheckpoint(tmp_path / "c/{step}", save_freq=1, slots=1, on_busy="skip", event_log=log)
    fit(make_model(), [callback], epochs=6)
    skipped = [event["step"] for event in read_events(log) if event["event"] == "skipped"]
    assert skipped == [stats.step for stats in callback.stats if stats.skipped]
    assert skipped


def test_a_run_begins_a_new_line_after_one_that_was_killed(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    log.write_text('{"event": "beg')
    EventLog(log).add("begin", run="a")
    EventLog(log).add("end", run="a")
    assert log.read_text().splitlines()[0] == '{"event": "beg'
    assert [json.loads(line)["event"] for line in log.read_text().splitlines()[1:]] == ["begin", "end"]


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
