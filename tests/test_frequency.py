"""How often to save within a budget: pure sequences under a made-up clock, and real runs of Keras."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import keras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import fit, list_steps, make_model

from offstep import ModelCheckpoint
from offstep.frequency import Choice, Frequency, parse_budget

pytestmark = pytest.mark.usefixtures("one_writer")


@dataclass
class Run:
    """A training whose times are given: what the policy sees of it, and what it costs."""

    frequency: Frequency
    now: list[float]
    batch_seconds: float
    call_seconds: float
    durable_seconds: float
    slowdown: float = 0.0  # share by which batches take longer while a checkpoint is written
    durable_at: float = -1.0
    saves: list[int] = field(default_factory=list)
    overlaps: int = 0
    batches: int = 0
    said: list[Choice] = field(default_factory=list)

    def train(self, batches: int) -> None:
        for _ in range(batches):
            is_written = self.now[0] < self.durable_at
            self.now[0] += self.batch_seconds * (1 + self.slowdown * is_written)
            self.batches += 1
            self._end_batch()

    def _end_batch(self) -> None:
        is_writing = self.now[0] < self.durable_at
        if not is_writing and self.durable_at >= 0:
            self.frequency.note_durable(self.durable_seconds)
            self.durable_at = -1.0
        if self.frequency.end_batch(is_writing=is_writing):
            self.overlaps += is_writing
            self.saves.append(self.batches)
            self.durable_at = self.now[0] + self.durable_seconds
            self.now[0] += self.call_seconds
            self.frequency.note_call(self.call_seconds)
        news = self.frequency.take_news()
        if news is not None:
            self.said.append(news)

    def pace(self) -> int:
        """Batches between the last two saves."""
        return self.saves[-1] - self.saves[-2]


def make_run(budget: float = 0.01, **times: float) -> Run:
    now = [0.0]
    return Run(Frequency(budget, clock=lambda: now[0]), now, **times)


def test_the_budget_decides_where_saves_are_soon_durable() -> None:
    run = make_run(batch_seconds=0.1, call_seconds=0.05, durable_seconds=0.2)
    run.train(400)
    assert run.pace() == 50  # 50 ms of 50 * 100 ms
    assert [choice.every for choice in run.said] == [50]


def test_the_disk_decides_where_saves_cost_little() -> None:
    run = make_run(batch_seconds=0.01, call_seconds=0.00001, durable_seconds=0.5)
    run.train(1000)
    assert run.pace() == 51
    assert run.overlaps == 0


def test_every_batch_is_saved_where_that_is_free() -> None:
    run = make_run(batch_seconds=1.0, call_seconds=0.001, durable_seconds=0.1)
    run.train(100)
    assert run.pace() == 2  # the batch between two saves shows how long one takes without a write
    assert run.saves[-1] == 100 or run.saves[-1] == 99


def test_what_batches_take_longer_during_a_write_counts() -> None:
    run = make_run(batch_seconds=0.1, call_seconds=0.0, durable_seconds=1.0, slowdown=0.5)
    run.train(1000)
    # Seven batches of 150 ms during the write of one second: 350 ms, one per cent of 35 s.
    assert run.pace() == 350


def test_the_wait_for_the_computation_is_no_stall() -> None:
    now = [0.0]
    frequency = Frequency(0.01, clock=lambda: now[0])
    run = Run(frequency, now, 0.1, 0.001, 0.05)
    for _ in range(200):
        now[0] += 0.1
        if frequency.end_batch(is_writing=False):
            frequency.note_call(5.001, compute_seconds=5.0)
            now[0] += 5.001
            frequency.note_durable(0.05)
    assert frequency.choice is not None
    assert frequency.choice.stall_seconds == pytest.approx(0.001)
    assert not run.said


def test_slower_steps_are_saved_more_often_and_that_is_said() -> None:
    run = make_run(batch_seconds=0.01, call_seconds=0.01, durable_seconds=0.001)
    run.train(1000)
    assert run.pace() == 100
    run.batch_seconds = 0.04
    run.train(2000)
    assert run.pace() == pytest.approx(25, rel=0.25)
    # It may come there in several strides, while old and new times are in the mean.
    assert [run.said[0].every, run.said[-1].every] == [100, run.pace()]
    assert len(run.said) <= 6


def test_times_that_vary_a_little_change_nothing() -> None:
    run = make_run(batch_seconds=0.1, call_seconds=0.05, durable_seconds=0.2)
    for number in range(600):
        run.batch_seconds = 0.1 + 0.01 * (number % 3 - 1)
        run.train(1)
    assert len(run.said) == 1


def test_the_first_save_and_the_first_batches_do_not_count() -> None:
    run = make_run(batch_seconds=60.0, call_seconds=0.0, durable_seconds=0.01)
    run.train(3)  # compilation
    run.batch_seconds = 0.1
    run.call_seconds = 30.0
    while not run.saves:
        run.train(1)
    run.call_seconds = 0.01
    run.train(300)
    assert run.pace() == 10


def test_what_was_due_and_not_saved_is_not_due_again_at_once() -> None:
    frequency = Frequency(0.01, clock=iter(range(1000)).__next__)
    due = [batch for batch in range(100) if frequency.end_batch(is_writing=False)]
    assert {after - before for before, after in pairwise(due)} == {8}


def test_a_pause_is_no_batch() -> None:
    run = make_run(batch_seconds=0.1, call_seconds=0.05, durable_seconds=0.01)
    for _ in range(50):
        run.train(10)
        run.frequency.pause()
        run.now[0] += 1000.0
        run.frequency.pause()
        run.frequency.resume()
    assert run.frequency.choice is not None
    assert run.frequency.choice.batch_seconds == pytest.approx(0.1)
    assert run.pace() == 50


@settings(deadline=None, max_examples=150)
@given(
    budget=st.sampled_from([0.001, 0.01, 0.05]),
    batch_seconds=st.floats(0.001, 10.0),
    stall=st.floats(0.0, 3.0),
    durable=st.floats(0.0001, 60.0),
    slowdown=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_budget_and_disk_are_kept_whatever_the_times(
    budget: float, batch_seconds: float, stall: float, durable: float, slowdown: float
) -> None:
    call_seconds, durable_seconds = stall * batch_seconds, durable * batch_seconds
    run = make_run(
        budget,
        batch_seconds=batch_seconds,
        call_seconds=call_seconds,
        durable_seconds=durable_seconds,
        slowdown=slowdown,
    )
    while len(run.said) == 0:
        run.train(1)
        assert run.batches < 1000
    start, saved, batches = run.now[0], len(run.saves), run.batches
    every = run.frequency.choice.every if run.frequency.choice else 0
    run.train(5 * every + 200)
    assert run.overlaps == 0
    saves = len(run.saves) - saved
    overhead = (run.now[0] - start) / ((run.batches - batches) * batch_seconds) - 1
    # One save may fall into the time without its batches; the frequency is kept within a quarter.
    allowed = 1.35 * budget * (saves + 1) / max(saves, 1)
    assert overhead <= allowed, (overhead, run.said)
    assert run.pace() >= durable  # in batches, as it was drawn


# ---------------------------------------------------------------------------------------------------- the words


def choice(every: int, stall: float, durable: float) -> Choice:
    return Choice(every, budget=0.01, batch_seconds=0.1, stall_seconds=stall, durable_seconds=durable)


def test_the_user_is_told_what_decides() -> None:
    assert choice(50, 0.05, 0.2).describe() == (
        "saving every 50 batches: a save costs 50 ms, a batch takes 100 ms; overhead 1.00% of 1.00%"
    )
    assert choice(20, 0.001, 1.9).describe() == (
        "saving every 20 batches: a save costs 1 ms, a batch takes 100 ms, a checkpoint is durable after 1.9 s; "
        "overhead 0.05%"
    )
    assert "every 100 batches" in choice(50, 0.05, 0.2).describe(batches_per_hook=2)
    assert "a batch takes 50 ms" in choice(50, 0.05, 0.2).describe(batches_per_hook=2)


@pytest.mark.parametrize(("text", "fraction"), [("1%", 0.01), ("0.5 %", 0.005), (0.02, 0.02), (" 12.5% ", 0.125)])
def test_a_budget_is_a_share(text: Any, fraction: float) -> None:
    assert parse_budget(text) == pytest.approx(fraction)


@pytest.mark.parametrize("budget", ["1", "", "%", "-1%", "0%", "100%", 0, 1, 1.5, -0.1, True, float("nan"), [], b"1%"])
def test_what_is_no_share_is_refused(budget: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Received: {budget!r}")):
        ModelCheckpoint("unused/{step}", overhead_budget=budget)


# ---------------------------------------------------------------------------------------------------- with Keras


class FastDisk(keras.callbacks.Callback):
    """Everything is durable at the end of an epoch, however busy the machine is."""

    def __init__(self, callback: ModelCheckpoint) -> None:
        super().__init__()
        self.callback = callback

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.callback.wait_until_finished()


def test_a_frequency_and_a_budget_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"save_freq or overhead_budget, not both. Received: save_freq=5"):
        ModelCheckpoint("unused/{step}", save_freq=5, overhead_budget="1%")


def test_a_run_of_keras_saves_within_its_budget_and_says_how_often(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = ModelCheckpoint(tmp_path / "{step}", overhead_budget="50%")
    fit(make_model(), [callback, FastDisk(callback)], epochs=60)  # 420 batches
    steps = list_steps(tmp_path)
    assert len(steps) >= 3
    assert callback.counts.durable == len(steps)
    said = [line for line in capsys.readouterr().out.splitlines() if "overhead" in line]
    assert said
    assert re.search(r"offstep: saving every (batch|[\d,]+ batches): a save costs .*, a batch takes ", said[0])
    assert not [a for a, b in pairwise(steps) if b - a < 2]


def test_steps_per_execution_are_batches_in_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = ModelCheckpoint(tmp_path / "{step}", overhead_budget=0.9)
    model = make_model(steps_per_execution=7)
    fit(model, [callback, FastDisk(callback)], epochs=60)
    said = re.findall(r"saving every ([\d,]+) batches", capsys.readouterr().out)
    assert said
    assert not [text for text in said if int(text.replace(",", "")) % 7]
