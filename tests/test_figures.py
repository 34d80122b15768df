"""The numbers of a report, on runs that can be reckoned by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from event_lines import BEGAN, EventLines

from offstep.figures import measure_cost, measure_inflation, measure_lag, measure_loss, spread
from offstep.history import Run, read_history


def read(lines: EventLines, directory: Path) -> Run:
    return read_history(lines.write(directory / "log")).runs[0]


def test_lag_grows_until_a_newer_checkpoint_is_durable(tmp_path: Path) -> None:
    lines = EventLines()
    lines.now += 10
    number = lines.snapshot(5)  # began at 10, durable at 12
    lines.durable(number, 5, 2.0)
    lines.now = BEGAN + 20
    lines.add("epoch", epoch=1, stall_seconds=0.0)
    lag = measure_lag(read(lines, tmp_path))
    assert lag.rises == ((BEGAN, BEGAN), (BEGAN + 12, BEGAN + 10))
    assert lag.most == pytest.approx(12)
    assert lag.mean == pytest.approx((12 * 12 / 2 + (2 + 10) / 2 * 8) / 20)


def test_a_save_that_is_overtaken_does_not_raise_the_lag(tmp_path: Path) -> None:
    lines = EventLines()
    first, second = lines.snapshot(1, stall=1.0), lines.snapshot(2, stall=1.0)
    lines.durable(second, 2, 1.0)
    lines.durable(first, 1, 5.0)
    assert [taken - BEGAN for _, taken in measure_lag(read(lines, tmp_path)).rises] == [0, 1]


def test_what_would_be_lost(tmp_path: Path) -> None:
    lines = EventLines()
    lines.train(4, 4, 8.0)
    loss = measure_loss(read(lines, tmp_path))
    assert (loss.seconds, loss.steps, loss.newest, loss.pending) == (8.0, 4, None, ())
    lines.durable(lines.snapshot(4, stall=0.5), 4)
    lines.train(10, 6, 12.0)
    lines.snapshot(10, stall=0.5)
    loss = measure_loss(read(lines, tmp_path))
    assert (loss.seconds, loss.steps, [save.step for save in loss.pending]) == (13.0, 6, [10])
    assert loss.newest is not None
    assert loss.newest.step == 4


def test_cost_is_stalls_and_what_batches_took_longer(tmp_path: Path) -> None:
    lines = EventLines()
    lines.train(2, 2, 100.0, warm_up=True)
    lines.train(22, 20, 2.0)
    lines.snapshot(22, stall=0.5)
    lines.train(32, 10, 1.5, writing=True)
    run = read(lines, tmp_path)
    inflation = measure_inflation(run)
    assert (inflation.free_seconds, inflation.writing_seconds, inflation.ratio) == pytest.approx((0.1, 0.15, 1.5))
    cost = measure_cost(run, inflation)
    assert cost.total_seconds == pytest.approx(0.5 + 0.5)
    assert cost.training_seconds == pytest.approx(104.0)


def test_a_change_that_may_be_chance_costs_nothing(tmp_path: Path) -> None:
    lines = EventLines()
    for number in range(10):
        lines.train(20 * number, 10, 2.0 if number % 2 else 1.0)
        lines.train(20 * number + 10, 10, 2.1 if number % 3 else 1.0, writing=True)
    run = read(lines, tmp_path)
    inflation = measure_inflation(run)
    assert inflation.ratio == pytest.approx((6 * 2.1 + 4) / 15)
    assert inflation.error > inflation.ratio - 1 > 0
    assert measure_cost(run, inflation).inflation_seconds == 0


def test_batches_of_a_host_that_runs_ahead_are_not_compared(tmp_path: Path) -> None:
    lines = EventLines()
    for number in range(10):
        lines.train(20 * number, 10, 0.01)
        lines.snapshot(20 * number, compute=1.0)
        lines.train(20 * number + 10, 10, 1.0, writing=True)
    run = read(lines, tmp_path)
    assert measure_inflation(run).is_ahead
    assert measure_inflation(run).ratio is None
    assert measure_cost(run, measure_inflation(run)).inflation_seconds is None


def test_a_shorter_last_batch_that_is_compiled_is_left_out(tmp_path: Path) -> None:
    lines = EventLines()
    lines.train(20, 20, 2.0)
    lines.train(40, 20, 2.0, writing=True)
    lines.train(41, 1, 30.0)
    lines.add("epoch", epoch=1, stall_seconds=0.0)
    found = measure_inflation(read(lines, tmp_path))
    assert (found.free_seconds, found.ratio, found.free_count) == pytest.approx((0.1, 1.0, 20))


def test_few_batches_are_not_compared(tmp_path: Path) -> None:
    lines = EventLines()
    lines.train(22, 20, 2.0)
    lines.train(25, 3, 3.0, writing=True)
    run = read(lines, tmp_path)
    assert measure_inflation(run).ratio is None
    assert measure_cost(run, measure_inflation(run)).total_seconds == 0


def test_batches_that_happen_to_be_faster_pay_for_no_stall(tmp_path: Path) -> None:
    lines = EventLines()
    lines.train(20, 20, 4.0)
    lines.snapshot(20, stall=0.5)
    lines.train(40, 20, 2.0, writing=True)
    run = read(lines, tmp_path)
    assert measure_cost(run, measure_inflation(run)).total_seconds == pytest.approx(0.5)


def test_the_spread_of_many() -> None:
    found = spread([float(number) for number in range(1, 101)])
    assert (found.median, found.p99, found.most) == (50, 100, 100)
    assert spread([2.0]) == spread([2.0, 2.0])
