"""The scorecard itself: that it runs, that its oracle tells one loss from another, and that it can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.crash

SCORECARD = Path(__file__).parents[1] / "benchmarks" / "scorecard"
Row = dict[str, Any]  # JSON


def run_scorecard(directory: Path, scenario: str, peer: str, *options: str) -> tuple[int, Row]:
    """Returns the exit status, and what it says of one scenario with one peer."""
    where = ["--dir", str(directory), "--results", str(directory)]
    command = [sys.executable, str(SCORECARD / "run.py"), "--scenarios", scenario, "--peers", peer, *where, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results = list(directory.glob("*-scorecard.json"))
    assert results, done.stderr
    row: Row = json.loads(results[0].read_text())["scenarios"][scenario]["peers"][peer]
    assert f"{row['text']}\n" in done.stdout
    return done.returncode, row


def test_a_kill_of_all_processes_is_survived(tmp_path: Path) -> None:
    status, row = run_scorecard(tmp_path, "kill_both", "offstep_keras", "--trials", "1")
    assert (status, row["text"]) == (0, "1 of 1 survived | lost 0 bytes | silent 0 | unreported 0 | hung 0"), row


@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_a_kill_at_any_call_to_the_disk_is_survived_and_not_when_files_are_written_in_place(tmp_path: Path) -> None:
    options = ("both_failpoints", "offstep_keras", "--trials", "40")
    status, row = run_scorecard(tmp_path / "whole", *options)
    assert (status, row["survived"]) == (0, row["trials"]), row
    assert row["trials"] > 10
    status, row = run_scorecard(tmp_path / "torn", *options, "--sabotage", "in_place")
    assert status == 1
    assert row["survived"] < row["trials"]
    assert row["lost_bytes"] > 0


# ------------------------------------------------------------------------------------------------------- the oracle


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Any:  # a module of the scorecard
    monkeypatch.syspath_prepend(str(SCORECARD))
    names = ("oracle", "model", "verdict")
    before = {name: sys.modules.pop(name, None) for name in names}
    import oracle

    yield oracle
    for name in names:
        sys.modules.pop(name, None)
        if before[name] is not None:
            sys.modules[name] = before[name]


CASES = {
    "all is there": ({"durable": [5, 10]}, {5: "equal", 10: "equal"}, ""),
    "retired by two newer ones": ({"durable": [5, 10, 15]}, {10: "equal", 15: "equal"}, ""),
    "retired by ones that were not reported yet": ({"durable": [5]}, {10: "equal", 15: "equal"}, ""),
    "the newest is gone": ({"durable": [5, 10]}, {5: "equal"}, "lost_bytes"),
    "both are gone": ({"durable": [5, 10]}, {}, "lost_bytes"),
    "it cannot be read": ({"durable": [5]}, {5: "error"}, "lost_bytes"),
    "it is another one": ({"durable": [5]}, {5: "wrong"}, "lost_bytes is_silent"),
    "what was only submitted": ({"submitted": [5]}, {}, ""),
    "what was submitted is wanted": ({"submitted": [5], "wants": True}, {}, "is_unreported"),
    "and somebody was told": ({"submitted": [5], "wants": True, "errors": "step 5 was not saved"}, {}, ""),
    "the training ended as if all were well": ({"submitted": [5], "is_done": True}, {}, "is_silent"),
    "nothing was saved at all": ({}, {}, "fault"),
}


@pytest.mark.parametrize(("said", "there", "expected"), CASES.values(), ids=CASES.keys())
def test_the_oracle_tells_what_was_lost(
    oracle: Any, said: dict[str, Any], there: dict[int, str], expected: str
) -> None:
    durable = said.get("durable", [])
    claims = oracle.Claims(said.get("submitted", durable), durable, said.get("is_done", False))
    found = [oracle.Found(str(step), step, state) for step, state in there.items()]
    more = {"wants_submitted": said.get("wants", False), "errors": said.get("errors", "")}
    verdict = oracle.judge(oracle.Shape(), 2, claims, found, **more)
    faults = [name for name in ("lost_bytes", "is_silent", "is_unreported", "fault") if getattr(verdict, name)]
    assert faults == expected.split()
    assert verdict.has_survived == (not faults)
    assert verdict.lost_bytes % oracle.Shape().state_bytes == 0
