"""`offstep report`: on the log of a real run, on ten thousand saves, and on everything that is no log."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import keras
import pytest
from command import offstep
from event_lines import EventLines, make_run
from runs import BATCHES, fit, make_data, make_model
from test_cli import as_nobody

from offstep import ModelCheckpoint

pytestmark = pytest.mark.usefixtures("one_writer")

OK, USAGE, NOTHING, UNSUITABLE, REFUSED = 0, 2, 3, 4, 6
_VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Its text, and whether every tag that was opened is closed, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self._open: list[str] = []
        self.tags: set[str] = set()
        self.feed(path.read_text())
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def real_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of a real training; not to be changed."""
    directory = tmp_path_factory.mktemp("real")
    callback = ModelCheckpoint(
        directory / "c/{step}",
        save_freq=3,
        max_to_keep=2,
        event_log=directory / "offstep-events.jsonl",
        in_process=True,
    )
    fit(make_model(), [callback], epochs=2, validation_data=make_data())
    return directory / "offstep-events.jsonl"


def test_the_report_of_a_real_run(real_log: Path, tmp_path: Path) -> None:
    run = offstep("report", real_log.parent, tmp_path / "r.html", "--json")
    assert (run.code, run.err) == (OK, "")
    found = run.document
    assert (found["durable"], found["failed"], found["skipped"]) == (4, 0, 0)
    assert found["last_step"] == 2 * BATCHES
    assert found["newest_durable_step"] == 12
    assert found["lost_now"]["steps"] == 2
    assert found["stall_seconds"]["most"] >= found["stall_seconds"]["median"] > 0
    assert 0 < found["cost_share"] < 1
    page = Page(tmp_path / "r.html")
    assert {"svg", "table"} <= page.tags
    assert not {"script", "img", "iframe"} & page.tags
    assert f"keras {keras.__version__}" in page.text
    assert "The run ended 2 steps after the newest durable checkpoint, step 12." in page.text
    assert page.text.count("retired") >= 2


def test_nothing_is_fetched(real_log: Path, tmp_path: Path) -> None:
    offstep("report", real_log, tmp_path / "r.html")
    content = (tmp_path / "r.html").read_text()
    assert re.findall(r"(?:src|href)=\"([^\"]*)\"", content) == ["data:,"]
    assert "url(" not in content
    assert "@import" not in content


def test_it_lies_beside_the_log_and_is_made_again(tmp_path: Path) -> None:
    log = make_run(4).write(tmp_path / "offstep-events.jsonl")
    for _ in range(2):
        run = offstep("report", tmp_path)
        assert run.code == OK
        assert run.out.startswith(f"{tmp_path}/offstep-report.html\n3 saves durable, 0 failed, 0 skipped\n")
        assert "if the job died now: " in run.out
    assert sorted(path.name for path in tmp_path.iterdir()) == [log.name, "offstep-report.html"]


def test_a_file_of_others_is_replaced_only_by_force(tmp_path: Path) -> None:
    log = make_run(2).write(tmp_path / "log")
    for option, target in (((), tmp_path / "thesis.html"), (("--trace",), tmp_path / "thesis.json")):
        target.write_text("mine")
        arguments = ["report", log, *([] if option else [target]), *option, *([target] if option else [])]
        run = offstep(*arguments)
        assert (run.code, run.err) == (REFUSED, f"offstep: it exists already; --force replaces it: {target}\n")
        assert target.read_text() == "mine"
        assert offstep(*arguments, "--force").code == OK
        assert offstep(*arguments).code == OK  # now it is one of ours


def test_a_place_where_no_file_can_be(tmp_path: Path) -> None:
    log = make_run(2).write(tmp_path / "log")
    run = offstep("report", log, tmp_path, "--force")
    assert (run.code, run.err) == (REFUSED, f"offstep: a directory is where the file shall go: {tmp_path}\n")
    run = offstep("report", log, tmp_path / "absent/r.html")
    assert (run.code, run.err) == (REFUSED, f"offstep: there is no such directory: {tmp_path}/absent\n")


def test_the_trace_is_one_that_perfetto_takes(real_log: Path, tmp_path: Path) -> None:
    offstep("report", real_log, tmp_path / "r.html", "--trace", tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    writes = [event["name"] for event in events if event["ph"] == "X" and event["name"].startswith("write ")]
    assert writes == [f"write step {step}" for step in (3, 6, 9, 12)]
    starts = [event["id"] for event in events if event["ph"] == "s"]
    assert starts == [event["id"] for event in events if event["ph"] == "f"] == [1, 2, 3, 4]
    tracks: dict[tuple[int, int], int] = {}
    for event in sorted((event for event in events if event["ph"] == "X"), key=lambda event: event["ts"]):
        track = event["pid"], event["tid"]
        assert event["ts"] >= tracks.get(track, 0) - 1000, event  # stretches of one track do not overlap
        assert event["dur"] >= 0
        tracks[track] = event["ts"] + event["dur"]
    assert {(1, 1), (1, 2), (2, 1), (2, 2)} <= set(tracks)
    assert next(event["args"]["s"] for event in events if event["ph"] == "C") == 0


def test_ten_thousand_saves_make_a_small_page(tmp_path: Path) -> None:
    log = make_run(10_000, keep=20).write(tmp_path / "log")
    run = offstep("report", log, "--json")
    assert run.document["durable"] == 9_999
    page = tmp_path / "offstep-report.html"
    assert page.stat().st_size < 200_000
    assert "These are the newest 50." in Page(page).text


@pytest.mark.parametrize("saves", [0, 1])
def test_a_run_that_has_hardly_begun(saves: int, tmp_path: Path) -> None:
    lines = EventLines()
    if saves:
        lines.snapshot(1)
    run = offstep("report", lines.write(tmp_path / "log"))
    assert (run.code, run.err) == (OK, "")
    assert "Nothing is durable" in Page(tmp_path / "offstep-report.html").text


def test_failures_skips_and_pending_saves_are_told(tmp_path: Path) -> None:
    log = make_run(12, failing=5, skipping=8).write(tmp_path / "log")
    found = offstep("report", log, "--json").document
    assert (found["durable"], found["failed"], found["skipped"], found["pending_steps"]) == (9, 1, 1, [482])
    text = Page(tmp_path / "offstep-report.html").text
    assert "1 failed, 1 skipped, 1 on the way" in text
    assert "No space left on device" in text
    assert "the writer would finish step 482" in text


def test_words_of_the_log_are_no_markup(tmp_path: Path) -> None:
    lines = EventLines(root="/<script>alert(1)</script>&amp;\"'")
    lines.fail(lines.snapshot(3), 3, "<img src=x onerror=alert(1)>")
    offstep("report", lines.write(tmp_path / "log"))
    page = Page(tmp_path / "offstep-report.html")
    assert not {"script", "img"} & page.tags
    assert "<img src=x onerror=alert(1)>" in page.text


def test_a_run_is_chosen_by_its_name(tmp_path: Path) -> None:
    first, second = make_run(3), EventLines(run="second")
    (tmp_path / "log").write_text("\n".join([*first.lines, *second.lines]))
    assert offstep("report", tmp_path / "log", "--json").document["run"] == "second"
    found = offstep("report", tmp_path / "log", "--run", "0badcafe", "--json").document
    assert (found["run"], found["runs"], found["durable"]) == ("0badcafe", ["0badcafe", "second"], 2)
    assert "2 runs are in this log" in Page(tmp_path / "offstep-report.html").text
    run = offstep("report", tmp_path / "log", "--run", "x")
    assert (run.code, run.err) == (
        USAGE,
        "offstep: the log has no run 'x'; the newest in it are 0badcafe, second\n",
    )


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, NOTHING, "does not exist"),
        (b"", NOTHING, "is empty: no event was logged"),
        (b'{"event": "beg', UNSUITABLE, "is no event log of offstep: none of its 1 lines is an event"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), UNSUITABLE, "is no event log of offstep"),
    ],
    ids=["absent", "empty", "torn", "foreign"],
)
def test_what_is_no_log(content: bytes | None, code: int, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "log").write_bytes(content)
    run = offstep("report", tmp_path / "log")
    assert (run.code, run.out) == (code, "")
    assert run.err.startswith(f"offstep: {tmp_path}/log {words}")
    assert not (tmp_path / "offstep-report.html").exists()


def test_a_directory_without_a_log(tmp_path: Path) -> None:
    run = offstep("report", tmp_path)
    assert run.code == NOTHING
    assert "holds no offstep-events.jsonl; give the file that event_log=" in run.err


def test_a_log_that_cannot_be_read(tmp_path: Path) -> None:
    log = make_run(2).write(tmp_path / "log")
    log.chmod(0)
    with as_nobody():
        run = offstep("report", log)
    assert run.code == REFUSED
    assert run.err.startswith("offstep: Permission denied")


def test_it_needs_neither_keras_nor_jax(tmp_path: Path) -> None:
    log = make_run(2).write(tmp_path / "log")
    script = (
        f"import sys; from offstep.cli import main; code = main(['report', {str(log)!r}, '--json']); "
        "sys.exit(code or any(name in sys.modules for name in ('keras', 'jax', 'orbax')))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
