"""What batches take, summed up."""

from __future__ import annotations

from offstep.batch_times import BatchTimes, Summary


class Clock:
    """Stands still until it is moved on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(times: BatchTimes, clock: Clock, seconds: list[float], *, is_writing: bool = False) -> list[Summary]:
    found = []
    for length in seconds:
        found.append(times.begin(is_writing=is_writing))
        clock.now += length
        times.end(0.0)
    return [summary for summary in found if summary is not None]


def test_batches_beside_a_write_are_summed_up_apart() -> None:
    clock = Clock()
    times = BatchTimes(clock)
    found = (
        run(times, clock, [0.25, 0.125]) + run(times, clock, [0.0625] * 3) + run(times, clock, [0.125], is_writing=True)
    )
    assert [(summary.count, summary.is_warm_up, summary.is_writing) for summary in found] == [
        (2, True, False),
        (3, False, False),
    ]
    assert (found[0].began, found[1].began) == (100.0, 100.375)
    assert (found[1].seconds, found[1].median_seconds, found[1].max_seconds) == (0.1875, 0.0625, 0.0625)
    last = times.take()
    assert last is not None
    assert (last.count, last.is_writing) == (1, True)
    assert times.take() is None


def test_the_stall_of_a_save_is_no_part_of_a_batch() -> None:
    clock = Clock()
    times = BatchTimes(clock)
    times.begin(is_writing=False)
    clock.now += 1.0
    times.end(0.75)
    clock.now += 5.0  # between epochs
    times.end(0.0)  # none has begun
    summary = times.take()
    assert summary is not None
    assert (summary.count, summary.seconds) == (1, 0.25)


def test_the_wait_for_a_device_counts_with_the_batches_after_it() -> None:
    clock = Clock()
    times = BatchTimes(clock)
    run(times, clock, [0.25, 0.25, 0.25])
    times.begin(is_writing=False)
    clock.now += 1.0  # of which 0.75 for three batches that were dispatched before
    times.end(0.0, 0.75)
    before = times.begin(is_writing=True)
    assert before is not None
    assert (before.count, before.seconds) == (2, 0.5)
    times.end(0.0)
    after = times.take()
    assert after is not None
    assert after.seconds == 0.75


def test_a_long_run_needs_few_summaries_and_little_memory() -> None:
    clock = Clock()
    times = BatchTimes(clock)
    found = run(times, clock, [0.01] * 400_000)
    assert sum(summary.count for summary in found) > 399_000
    assert len(found) < 1000 + 1000 * 1.4  # one a second for 1000 s, then one for each thousandth of the run
    assert all(abs(summary.median_seconds - 0.01) < 1e-6 for summary in found)
