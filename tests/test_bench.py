"""What `offstep bench` makes of the times that it has taken, and that it takes them."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import offstep

from offstep import keras_trial
from offstep.bench import conclude
from offstep.commands import Answer
from offstep.overhead import Cost, advise_for_budget, advise_for_failures, find_cost, find_interval
from offstep.quantities import parse_bytes, parse_seconds
from offstep.tables import make_console
from offstep.trial import Run, Spec, Trial, run_trials

OK, USAGE, REFUSED = 0, 2, 6
COST = Cost("offstep", 0.1, call_seconds=0.01, stall_seconds=0.02, noise_seconds=0, finished_seconds=0.55, overheads={})


def make_run(every: int, wall_seconds: float) -> Run:
    steps = tuple((0.1 * number, 0.1 * number + 0.09) for number in range(every * 3 + every - 1))
    return Run(every, 3, wall_seconds, call_seconds=(0.01, 0.03), finished_seconds=(0.4, 0.5, 0.6), steps=steps)


# --- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("64kB", 64_000), ("7B", 7)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(("text", "seconds"), [("120ms", 0.12), ("24h", 86_400), ("1.5 min", 90), (".5s", 0.5)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "2", "GB", "-2GB", "0s", "2 XB", "1h30", "nan s"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    for parse in (parse_bytes, parse_seconds):
        with pytest.raises(ValueError, match=f"Received: {text!r}"):
            parse(text)


def test_the_stall_is_what_the_run_took_longer_by() -> None:
    # 5 steps of 0.1 s with 3 saves in 2 s; 23 in 2.6 s, where a save is finished before the next one begins.
    trial = Trial("offstep", 10, 1, "cpu", 0, ((0.1,) * 4, (0.1,) * 4), (make_run(1, 2.0), make_run(6, 2.6)))
    cost = find_cost(trial)
    assert cost.stall_seconds == pytest.approx((2.6 - 2.3) / 3)
    assert cost.overheads == {1: pytest.approx(2.0 / 0.3 - 1), 6: pytest.approx(2.6 / 2.3 - 1)}
    assert (cost.call_seconds, cost.finished_seconds, cost.noise_seconds) == (pytest.approx(0.02), 0.5, 0)


def test_steps_that_vary_or_drift_are_noise() -> None:
    trial = Trial("offstep", 10, 1, "cpu", 0, ((0.1,) * 4, (0.1,) * 4), (make_run(6, 2.6),))
    drifting = find_cost(replace(trial, plain_seconds=((0.09,) * 4, (0.11,) * 4)))
    assert drifting.noise_seconds == pytest.approx(math.hypot(0.01 * math.sqrt(23 + 23**2 / 8), 0.01 * 23) / 3)
    varying = find_cost(replace(trial, plain_seconds=((0.09, 0.11), (0.11, 0.09))))
    assert varying.noise_seconds == pytest.approx(0.01 * math.sqrt(23 + 23**2 / 4) / 3)


def test_the_budget_and_the_disk_bound_the_frequency() -> None:
    by_budget = advise_for_budget(COST, 0.01)
    assert (by_budget.every, by_budget.overhead) == (20, pytest.approx(0.01))
    assert by_budget.lost_seconds == pytest.approx(20 * 0.1 + 0.55)
    assert advise_for_budget(COST, 0.5).every == 6  # 0.55 s until it is durable
    assert advise_for_budget(replace(COST, stall_seconds=-1.0), 0.01).every == 10  # noise gives nothing back


@pytest.mark.parametrize("mtbf_seconds", [600.0, 86_400.0])
@pytest.mark.parametrize("cost_seconds", [0.02, 2.0, 60.0])
def test_the_optimum_is_that_of_daly_s_model(cost_seconds: float, mtbf_seconds: float) -> None:
    """His equation 20: the time that a run takes for each second of work, by the interval."""
    found = find_interval(cost_seconds, mtbf_seconds)
    intervals = found * np.linspace(0.5, 2, 3001)
    factors = mtbf_seconds * np.expm1((intervals + cost_seconds) / mtbf_seconds) / intervals
    at_found = mtbf_seconds * math.expm1((found + cost_seconds) / mtbf_seconds) / found
    assert at_found <= factors.min() * 1.0001
    assert find_interval(2 * mtbf_seconds, mtbf_seconds) == mtbf_seconds


def test_cheaper_saves_waste_less_to_failures() -> None:
    ours = advise_for_failures(replace(COST, finished_seconds=0.1), 3600)
    theirs = advise_for_failures(replace(COST, stall_seconds=2.0, finished_seconds=2.0), 3600)
    assert (ours.wasted or 1) < 0.2 * (theirs.wasted or 0)
    assert ours.every < theirs.every


def make_trial(peer: str, wall_seconds: float, rounds: int = 3) -> Trial:
    return Trial(peer, 500_000_000, 400, "cpu:0 cpu", rounds, ((0.1,) * 4, (0.1,) * 4), (make_run(6, wall_seconds),))


def show(answer: Answer) -> str:
    file = io.StringIO()
    console = make_console(file)
    for part in answer.shown:
        console.print(part)
    return file.getvalue()


def test_the_answer_recommends_a_frequency(tmp_path: Path) -> None:
    spec = Spec(str(tmp_path), 500_000_000, 400, 0.1, (6,))
    trials = [make_trial("offstep", 2.36), make_trial("model_checkpoint", 8.3)]
    answer = conclude(spec, trials, {"orbax_checkpoint": "no such callback"}, budget=0.01, mtbf_seconds=86_400)
    text = show(answer)
    assert answer.code == OK
    assert text.startswith("500 MB of state in 400 leaves, steps of 100 ms on cpu:0 cpu, saved to ")
    assert 'Recommended: offstep.ModelCheckpoint("ckpts/{step}", save_freq=20), or overhead_budget="1%"' in text
    assert re.search(r"keras ModelCheckpoint, .keras +20 ms +2 s +± 0 ms +500 ms +not durable +\+260.9%", text)
    assert re.search(r"offstep, directories +20 batches +2 s +at most 2.5 s +\d+ batches +0.\d+%", text)
    assert "keras OrbaxCheckpoint failed: no such callback" in text
    assert [peer["is_durable"] for peer in answer.document["peers"]] == [True, False]


def test_the_answer_says_where_it_is_not_to_be_relied_on(tmp_path: Path) -> None:
    spec = Spec(str(tmp_path), 500_000_000, 400, 0.1, (6,))
    theirs = make_trial("model_checkpoint", 2.2, rounds=0)
    answer = conclude(spec, [theirs], {"offstep": "disk full"}, budget=0.01, mtbf_seconds=None)
    text = show(answer)
    assert answer.code == REFUSED
    assert "Some stalls are within the noise" in text
    assert "No work was added to the steps: Adam on such a state takes more than 100 ms here." in text
    assert "Recommended" not in text


# --- measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", ["offstep", "orbax_checkpoint"])
def test_a_trial_times_every_save(peer: str, tmp_path: Path) -> None:
    spec = Spec(str(tmp_path), 50_000, 20, 0.002, (2,), saves=2, peer=peer, rounds=1)
    trial = keras_trial.run(spec)
    assert Trial.from_json(trial.to_json()) == trial
    assert (trial.leaves, trial.rounds) == (20, 1)
    assert trial.state_bytes == pytest.approx(50_000, rel=0.1)
    [run] = trial.runs
    assert (run.every, run.saves, len(run.steps), len(run.call_seconds)) == (2, 2, 5, 2)
    assert all(begin < end for begin, end in run.steps)
    assert 0 < run.steps[-1][1] <= run.wall_seconds
    assert len(run.finished_seconds) == (2 if peer == "offstep" else 1)
    assert list(tmp_path.iterdir()) == []


def test_work_is_added_to_short_steps(tmp_path: Path) -> None:
    spec = Spec(str(tmp_path), 10_000, 8, 0.01, (1,), saves=1, peer="model_checkpoint")
    assert keras_trial.run(spec).rounds > 0


@pytest.mark.timeout(600)
@pytest.mark.campaign
def test_the_command_compares_with_stock_callbacks(tmp_path: Path) -> None:
    arguments = ["--state", "1MB", "--leaves", "30", "--step", "5ms", "--every", "1", "4", "--mtbf", "24h"]
    run = offstep("bench", tmp_path, *arguments, "--json")
    assert run.code == OK, run.err
    found = run.document
    assert found["failures"] == {}
    assert [peer["peer"] for peer in found["peers"]] == [
        "offstep",
        "offstep_keras",
        "model_checkpoint",
        "orbax_checkpoint",
    ]
    assert all(set(peer["overheads"]) == {"1", "4"} for peer in found["peers"])
    assert all(peer["optimum"]["wasted"] > 0 for peer in found["peers"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(600)
@pytest.mark.campaign
def test_a_training_that_fails_is_told_by_its_last_words(tmp_path: Path) -> None:
    trials, failures = run_trials(Spec(str(tmp_path), 10_000, 8, 0.01, (0,), saves=1), lambda _: None)
    assert trials == []
    assert "Received: save_freq=0" in failures["offstep"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--state", "2XB"], "expected a size such as '500MB' or '2GB'. Received: '2XB'"),
        (["--step", "fast"], "expected a time such as '120ms', '30s' or '24h'. Received: 'fast'"),
        (["--mtbf", "0h"], "expected a time such as '120ms', '30s' or '24h'. Received: '0h'"),
        (["--every", "5", "0"], "--every must be at least 1. Received: [5, 0]"),
        (["--leaves", "0"], "--leaves must be at least 1. Received: 0"),
        (["--budget", "2"], "overhead_budget must be a share of the time such as '1%' or 0.01. Received: '2'"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_trained(arguments: list[str], words: str, tmp_path: Path) -> None:
    run = offstep("bench", tmp_path, *arguments)
    assert (run.code, run.out, run.err) == (USAGE, "", f"offstep: {words}\n")


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    run = offstep("bench", tmp_path, "--state", "500TB")
    assert run.code == REFUSED
    assert "give less with --state" in run.err


def test_a_place_that_is_no_directory_is_told(tmp_path: Path) -> None:
    run = offstep("bench", tmp_path / "absent")
    assert (run.code, run.err) == (REFUSED, f"offstep: bench needs a directory that exists: {tmp_path}/absent\n")
