"""Reading an event log: whatever a kill, another version or another program has left in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from event_lines import BEGAN, EventLines, make_run

from offstep.errors import CheckpointNotFound, UnsupportedFormat
from offstep.history import find_log, read_history


def test_what_became_of_each_save(tmp_path: Path) -> None:
    lines = EventLines()
    for step in (10, 20, 30):
        lines.snapshot(step)
    lines.durable(1, 10)
    lines.durable(2, 20, retired=(10,))
    lines.skip(40)
    lines.fail(3, 30, "OSError: full")
    lines.snapshot(50)
    [run] = read_history(lines.write(tmp_path / "log")).runs
    assert [save.step for save in run.saves] == [10, 20, 30, 40, 50]
    assert [save.is_retired for save in run.saves] == [True, False, False, False, False]
    assert [save.error for save in run.saves] == [None, None, "OSError: full", None, None]
    assert [save.is_skipped for save in run.saves] == [False, False, False, True, False]
    assert [save.is_pending for save in run.saves] == [False, False, False, False, True]
    assert run.saves[0].durable_at == pytest.approx(BEGAN + 0.35)
    assert not run.has_ended


def test_a_later_save_to_one_path_replaces_the_one_before(tmp_path: Path) -> None:
    lines = EventLines()
    for number in (1, 2):
        lines.durable(lines.snapshot(7), 7)
        assert number
    [run] = read_history(lines.write(tmp_path / "log")).runs
    assert [save.is_retired for save in run.saves] == [True, False]


def test_a_step_that_was_retired_and_saved_again_is_there(tmp_path: Path) -> None:
    lines = EventLines()
    lines.durable(lines.snapshot(7), 7)
    lines.durable(lines.snapshot(8), 8, retired=(7,))
    lines.durable(lines.snapshot(7), 7)
    [run] = read_history(lines.write(tmp_path / "log")).runs
    assert [save.is_retired for save in run.saves] == [True, False, False]


def test_half_a_line_of_a_killed_run_is_left_out(tmp_path: Path) -> None:
    path = make_run(3).write(tmp_path / "log")
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    history = read_history(path)
    assert history.unreadable == 1
    assert len(history.runs[0].saves) == 2


def test_runs_that_log_at_the_same_time_are_told_apart(tmp_path: Path) -> None:
    first, second = make_run(3).lines, EventLines(run="another1", root="/other")
    second.durable(second.snapshot(5), 5)
    mixed = [line for pair in zip(first, second.lines, strict=False) for line in pair] + first[len(second.lines) :]
    (tmp_path / "log").write_text("\n".join(mixed))
    history = read_history(tmp_path / "log")
    assert [(run.name, len(run.saves)) for run in history.runs] == [("0badcafe", 3), ("another1", 1)]


@pytest.mark.parametrize(
    "change",
    [{"step": "ten"}, {"time": None}, {"stall_seconds": -1}, {"path": 5}, {"began": True}, {"run": "stranger"}],
    ids=str,
)
def test_a_line_with_wrong_values_is_left_out(change: dict[str, object], tmp_path: Path) -> None:
    lines = EventLines()
    lines.snapshot(10)
    lines.lines[-1] = json.dumps(json.loads(lines.lines[-1]) | change)
    history = read_history(lines.write(tmp_path / "log"))
    assert history.unreadable == 1
    assert history.runs[0].saves == []


def test_an_event_of_an_unknown_kind_is_no_error(tmp_path: Path) -> None:
    lines = EventLines()
    lines.now += 5
    lines.add("uploaded", to="gs://")
    [run] = read_history(lines.write(tmp_path / "log")).runs
    assert run.last_at == BEGAN + 5


@pytest.mark.parametrize(
    "content", [b"hello\n", b"[1, 2]\n", b'{"event": "begin"}\n', b"\xff\xfe\x00\n", b'{"run": "a", "event": "end"}\n']
)
def test_a_file_of_others_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(UnsupportedFormat, match="is no event log of offstep"):
        read_history(tmp_path / "log")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_told(content: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(content)
    with pytest.raises(CheckpointNotFound, match="is empty: no event was logged"):
        read_history(tmp_path / "log")


def test_a_log_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    lines = EventLines()
    lines.lines[0] = lines.lines[0].replace('"version": 1', '"version": 2')
    with pytest.raises(UnsupportedFormat, match="the log has version 2; this offstep reads up to 1"):
        read_history(lines.write(tmp_path / "log"))


def test_the_log_of_a_directory_is_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="holds no offstep-events"):
        find_log(tmp_path)
    (tmp_path / "offstep-events.jsonl").touch()
    assert find_log(tmp_path) == tmp_path / "offstep-events.jsonl"
