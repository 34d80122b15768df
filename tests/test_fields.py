from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offstep import fields


class Owner:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def test_only_what_changed_is_kept_and_comes_back() -> None:
    owner = Owner(patience=3, wait=0, best=None, names=["a"], order=np.arange(3), call=print)
    baseline = fields.copy_fields(fields.read_fields(owner))
    owner.wait, owner.best = 2, 0.5
    owner.names.append("b")
    owner.order[0] = 7
    changed = fields.copy_fields(fields.select_changed(fields.read_fields(owner), baseline))
    assert set(changed) == {"wait", "best", "names", "order"}
    again = Owner(patience=9, wait=0, best=None, names=["a"], order=np.arange(3), call=print)
    fields.write_fields(again, changed)
    assert (again.patience, again.wait, again.best, again.names) == (9, 2, 0.5, ["a", "b"])
    assert again.order.tolist() == [7, 1, 2]


def test_lists_and_dicts_are_changed_in_place_because_others_hold_them() -> None:
    owner = Owner(history={"loss": [1.0]}, epochs=[0])
    history, epochs = owner.history, owner.epochs
    fields.write_fields(owner, {"history": {"loss": [1.0, 0.5]}, "epochs": [0, 1]})
    assert history == {"loss": [1.0, 0.5]}
    assert epochs == [0, 1]


@pytest.mark.parametrize(
    ("generator", "draw"),
    [
        (np.random.default_rng(3), lambda generator: generator.normal()),
        (np.random.Generator(np.random.PCG64DXSM(3)), lambda generator: generator.normal()),
        (np.random.RandomState(3), lambda generator: generator.normal()),
        (random.Random(3), lambda generator: generator.random()),
    ],
    ids=["default", "PCG64DXSM", "RandomState", "random.Random"],
)
def test_random_generators_go_on_where_they_were(generator: Any, draw: Any) -> None:
    owner = Owner(generator=generator)
    draw(generator)
    state = fields.copy_fields(fields.read_fields(owner))
    expected = draw(generator)
    draw(generator)
    fields.write_fields(owner, state)
    assert owner.generator is generator
    assert draw(generator) == expected


def test_large_data_are_no_fields_but_a_shuffle_of_them_is_seen() -> None:
    owner = Owner(x=np.arange(3 << 20), names=[str(i) for i in range(20_000)], order=list(range(20_000)))
    assert set(fields.read_fields(owner)) == {"order"}
    before = fields.sample_data(owner)
    assert set(before) == {"x", "names"}
    np.random.default_rng(1).shuffle(owner.x)
    assert fields.sample_data(owner) != before


def test_what_may_hide_state_is_named() -> None:
    owner = Owner(path=Path(), transform=print, size=3, handle=object(), stream=iter([1]))
    assert fields.find_opaque(owner) == ["handle", "stream"]
