"""Which checkpoints go, and above all which stay."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offstep.retention import Kept, select_expired

Rules = dict[str, Any]  # keyword arguments of `select_expired`

metrics = st.none() | st.floats() | st.integers(-3, 3).map(float)
kepts = st.builds(Kept, st.integers(0, 30), metrics, st.booleans())
roots = st.lists(kepts, min_size=1, max_size=20, unique_by=lambda kept: kept.step)
rules = st.fixed_dictionaries(
    {
        "keep": st.integers(1, 6),
        "keep_best": st.integers(1, 4),
        "keep_every": st.none() | st.integers(1, 10),
        "mode": st.sampled_from(["min", "max"]),
    }
)


def test_newest_k_stay() -> None:
    assert select_expired([1, 2, 3, 4], 4, keep=2) == [1, 2]


def test_newest_counts_even_if_it_is_not_listed_yet() -> None:
    assert select_expired([1, 2, 3], 4, keep=2) == [1, 2]


def test_nothing_goes_without_a_limit() -> None:
    assert select_expired([1, 2, 3], 3, keep=None, keep_every=10) == []


def test_another_timeline_is_left_alone() -> None:
    assert select_expired([5, 10, 900, 1000], 15, keep=2) == [5]


def test_replace_all_leaves_only_the_newest() -> None:
    assert select_expired([5, 10, 900], 15, keep=3, replace_all=True) == [5, 10, 900]


def test_replace_all_lets_no_metric_keep_an_old_step() -> None:
    steps = [Kept(1, metric=0.1), Kept(2, metric=0.9)]
    assert select_expired(steps, 2, keep=None, replace_all=True) == [1]


def test_replace_all_by_non_finite_weights_spares_the_finite() -> None:
    steps = [Kept(1), Kept(2, finite=False), Kept(3, finite=False)]
    assert select_expired(steps, 3, keep=None, replace_all=True) == [2]


def test_best_stays_beside_the_newest() -> None:
    steps = [Kept(1, 0.5), Kept(2, 0.1), Kept(3, 0.7), Kept(4, 0.6)]
    assert select_expired(steps, 4, keep=1) == [1, 3]
    assert select_expired(steps, 4, keep=1, mode="max") == [1, 2]
    assert select_expired(steps, 4, keep=1, keep_best=2) == [3]


def test_newer_of_two_equally_good_stays() -> None:
    assert select_expired([Kept(1, 0.5), Kept(2, 0.5), Kept(3, 0.9)], 3, keep=1) == [1]


@pytest.mark.parametrize("metric", [math.nan, -math.inf, None])
def test_non_finite_metric_is_never_best(metric: float | None) -> None:
    assert select_expired([Kept(1, metric), Kept(2, 0.5), Kept(3, 0.9)], 3, keep=1) == [1]


def test_multiples_stay() -> None:
    assert select_expired([0, 5, 10, 15, 20, 25], 25, keep=1, keep_every=10) == [5, 15]


def test_non_finite_weights_take_no_place_from_finite_ones() -> None:
    steps = [Kept(1), Kept(2), Kept(3, finite=False), Kept(4, finite=False), Kept(5, finite=False)]
    assert select_expired(steps, 5, keep=2) == [3]


@pytest.mark.parametrize("rule", ["keep", "keep_best", "keep_every"])
def test_count_below_one_is_refused(rule: str) -> None:
    with pytest.raises(ValueError, match=f"^{rule} must be at least 1, got 0$"):
        select_expired([1], 1, **{"keep": 1, rule: 0})


@given(root=roots, newest=st.integers(0, 30), rules=rules)
def test_k_newest_stay_and_another_timeline_is_never_touched(root: list[Kept], newest: int, rules: Rules) -> None:
    expired = select_expired(root, newest, **rules)
    steps = {kept.step for kept in root} | {newest}
    window = sorted((step for step in steps if step <= newest), reverse=True)[: rules["keep"]]
    assert not set(expired) & set(window)
    assert all(step < newest and step in steps for step in expired)
    assert expired == sorted(set(expired))


@given(root=roots, newest=st.integers(0, 30), rules=rules)
def test_best_and_multiples_are_never_retired(root: list[Kept], newest: int, rules: Rules) -> None:
    expired = select_expired(root, newest, **rules)
    sign = 1 if rules["mode"] == "min" else -1
    scores = {
        kept.step: sign * kept.metric
        for kept in root
        if kept.step <= newest and kept.finite and kept.metric is not None and math.isfinite(kept.metric)
    }
    staying = sorted(score for step, score in scores.items() if step not in expired)
    assert staying[: rules["keep_best"]] == sorted(scores.values())[: rules["keep_best"]]
    if rules["keep_every"] is not None:
        assert all(step % rules["keep_every"] for step in expired)


@given(root=roots, newest=st.integers(0, 30), rules=rules, replace_all=st.booleans())
def test_last_finite_checkpoint_is_never_retired(
    root: list[Kept], newest: int, rules: Rules, replace_all: bool
) -> None:
    expired = select_expired(root, newest, **rules, replace_all=replace_all)
    finite = {kept.step for kept in root if kept.finite}
    if newest not in {kept.step for kept in root}:
        finite.add(newest)
    assert not finite or finite - set(expired)


@given(root=roots, rules=rules)
def test_non_finite_checkpoints_never_retire_a_finite_one(root: list[Kept], rules: Rules) -> None:
    newest = max(kept.step for kept in root)
    only_finite = [kept for kept in root if kept.finite]
    expired = set(select_expired(root, newest, **rules))
    finite_steps = {kept.step for kept in only_finite}
    expected = select_expired(only_finite, max(finite_steps), **rules) if only_finite else []
    assert expired & finite_steps == set(expected)


@given(root=roots, newest=st.integers(0, 30), rules=rules)
def test_a_second_pass_finds_nothing_more(root: list[Kept], newest: int, rules: Rules) -> None:
    first = select_expired(root, newest, **rules)
    rest = [kept for kept in root if kept.step not in first]
    assert select_expired(rest, newest, **rules) == []


@given(root=roots, newest=st.integers(0, 30), rules=rules, data=st.data())
def test_order_and_duplicates_do_not_matter(root: list[Kept], newest: int, rules: Rules, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(root + root))
    assert select_expired(shuffled, newest, **rules) == select_expired(root, newest, **rules)


@given(steps=st.sets(st.integers(0, 100)), newest=st.integers(0, 100))
def test_replace_all_takes_everything_else(steps: set[int], newest: int) -> None:
    assert select_expired(steps, newest, keep=None, replace_all=True) == sorted(steps - {newest})
