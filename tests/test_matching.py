"""Which stored leaf goes where: by name, by the names of a fresh process, by position."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from offstep.matching import Matching, TargetLeaf, is_selected, match, rename_leaves
from offstep.stored import StoredLeaf

Shape = tuple[int, ...]


def stored(*leaves: tuple[str, Shape]) -> list[tuple[tuple[str, ...], StoredLeaf]]:
    return [(tuple(name.split("/")), StoredLeaf(tuple(name.split("/")), shape, "float32")) for name, shape in leaves]


def targets(*leaves: tuple[str, Shape]) -> list[TargetLeaf]:
    return [TargetLeaf(tuple(name.split("/")), shape, "float32") for name, shape in leaves]


def pairs(matching: Matching, wanted: Sequence[TargetLeaf]) -> dict[str, str]:
    return {wanted[number].name: leaf.name for number, leaf in matching.pairs}


T, OPT = "trainable_variables/", "optimizer_variables/"


def test_names_decide() -> None:
    wanted = targets((f"{T}a/kernel", (2,)), (f"{T}b/kernel", (2,)))
    matching = match(stored((f"{T}b/kernel", (2,)), (f"{T}a/kernel", (2,))), wanted)
    assert pairs(matching, wanted) == {f"{T}a/kernel": f"{T}a/kernel", f"{T}b/kernel": f"{T}b/kernel"}
    assert not matching.by_position


def test_numbered_names_of_a_later_model_are_matched_by_position() -> None:
    wanted = targets(
        (f"{T}dense_4/kernel", (2,)), (f"{T}dense_5/kernel", (2,)), (f"{OPT}adam/dense_4_kernel_velocity", (2,))
    )
    there = stored(
        (f"{T}dense_3/kernel", (2,)), (f"{T}dense_4/kernel", (2,)), (f"{OPT}adam/dense_3_kernel_velocity", (2,))
    )
    expected = {
        f"{T}dense_4/kernel": f"{T}dense_3/kernel",
        f"{T}dense_5/kernel": f"{T}dense_4/kernel",
        f"{OPT}adam/dense_4_kernel_velocity": f"{OPT}adam/dense_3_kernel_velocity",
    }
    for is_ordered in (True, False):
        matching = match(there, wanted, is_ordered=is_ordered)
        assert pairs(matching, wanted) == expected
        assert matching.by_position == expected


def test_numbers_count_as_numbers() -> None:
    wanted = targets(*((f"{T}dense_{number}/kernel", (number,)) for number in range(20, 32)))
    there = stored(*((f"{T}dense_{number}/kernel", (number + 20,)) for number in sorted(range(12), key=str)))
    matching = match(there, wanted, is_ordered=False)
    assert all(
        name.endswith(f"_{int(other.split('_')[2].split('/')[0]) + 20}/kernel")
        for name, other in pairs(matching, wanted).items()
    )
    assert len(matching.pairs) == 12


def test_names_of_a_fresh_process_come_before_the_position() -> None:
    wanted = targets((f"{T}dense_1/kernel", (2,)), (f"{T}dense/kernel", (2,)))  # in the order of the layers
    there = stored((f"{T}dense/kernel", (2,)), (f"{T}dense_1/kernel", (2,)))
    names = [("trainable_variables", "dense", "kernel"), ("trainable_variables", "dense_1", "kernel")]
    matching = match(there, wanted, is_ordered=True, find_names=lambda: names)
    assert pairs(matching, wanted) == {
        f"{T}dense_1/kernel": f"{T}dense/kernel",
        f"{T}dense/kernel": f"{T}dense_1/kernel",
    }
    assert not matching.by_position


def test_names_of_a_fresh_process_are_not_asked_for_without_need() -> None:
    wanted = targets((f"{T}a/kernel", (2,)))

    def fail() -> Sequence[tuple[str, ...]]:
        raise AssertionError("asked")

    assert match(stored((f"{T}a/kernel", (2,))), wanted, is_ordered=True, find_names=fail).pairs


def test_a_tree_is_never_matched_by_position() -> None:
    matching = match(stored(("a_1/w", (2,))), targets(("a_2/w", (2,))), may_use_position=False)
    assert (matching.pairs, matching.missing, matching.left_over) == ((), ("a_2/w",), ("a_1/w",))


def test_other_shapes_and_dtypes_do_not_fit() -> None:
    wanted = [TargetLeaf(("a",), (2,), "float32"), TargetLeaf(("b",), (3,), "bfloat16")]
    matching = match(stored(("a", (3,)), ("b", (3,))), wanted, may_use_position=False)
    assert matching.mismatched["a"].startswith("the checkpoint holds float32[3], expected float32[2]")
    assert matching.mismatched["b"].startswith("the checkpoint holds float32[3], expected bfloat16[3]; pass cast=True")
    assert len(match(stored(("b", (3,))), wanted[1:], may_use_position=False, cast=True).pairs) == 1


@pytest.mark.parametrize(
    ("partial", "expected"),
    [
        (None, True),
        ("trainable_variables", True),
        ("trainable_variables/a", True),
        ("a", True),
        ("a/kernel", True),
        ("kernel", False),
        ("a/ker", False),
        (["b", "a"], True),
        (lambda name: name == "trainable_variables/a/kernel", True),
    ],
)
def test_selection(partial: object, expected: bool) -> None:
    assert is_selected(("trainable_variables", "a", "kernel"), partial) is expected  # type: ignore[arg-type]


def test_the_group_may_be_left_out_for_keras_only() -> None:
    assert not is_selected(("params", "a"), "a")


def test_renaming_takes_the_place_of_another() -> None:
    leaves = stored((f"{T}a/kernel", (2,)), (f"{T}b/kernel", (2,)), (f"{T}c/kernel", (2,)))
    renamed = rename_leaves(leaves, {"a": "b"})
    assert [("/".join(map(str, path)), leaf.name) for path, leaf in renamed] == [
        (f"{T}b/kernel", f"{T}a/kernel"),
        (f"{T}c/kernel", f"{T}c/kernel"),
    ]
    assert rename_leaves(leaves, lambda name: None if "/a/" in name else name) == leaves[1:]


def test_renaming_takes_along_what_an_optimizer_keeps_for_a_weight() -> None:
    leaves = stored(
        (f"{T}a/kernel", (2,)),
        (f"{T}a_b/kernel", (2,)),
        (f"{OPT}adam/iteration", ()),
        (f"{OPT}adam/a_kernel_momentum", (2,)),
        (f"{OPT}adam/a_b_kernel_momentum", (2,)),
    )
    renamed = rename_leaves(leaves, {"a": "x/y"})
    assert ["/".join(map(str, path)) for path, _ in renamed] == [
        f"{T}x/y/kernel",
        f"{T}a_b/kernel",
        f"{OPT}adam/iteration",
        f"{OPT}adam/x_y_kernel_momentum",
        f"{OPT}adam/a_b_kernel_momentum",
    ]


SEED = "non_trainable_variables/seed_generator{}/seed_generator_state"


def test_what_does_not_fit_a_later_model_is_told_of_its_leaf() -> None:
    there = stored(
        (f"{T}dense/kernel", (2, 8)),
        (f"{T}dense_1/kernel", (8, 1)),
        (f"{OPT}adam/dense_kernel_momentum", (2, 8)),
        (SEED.format(""), (2,)),
    )
    wanted = targets(
        (f"{T}s_1/dense_4/kernel", (2, 9)),
        (f"{T}s_1/dense_5/kernel", (8, 1)),
        (f"{OPT}sgd/s_1_dense_4_kernel_momentum", (2, 9)),
        (SEED.format("_7"), (2,)),
        (SEED.format("_8"), (2,)),
    )
    names = [(t.path[0], *t.path[2:]) if t.path[1] == "s_1" else t.path for t in wanted]
    for is_ordered in (True, False):
        matching = match(there, wanted, is_ordered=is_ordered, find_names=lambda: names)
        assert list(matching.mismatched) == [wanted[0].name]
        assert (
            "holds float32[2, 8] as trainable_variables/dense/kernel, expected" in matching.mismatched[wanted[0].name]
        )
        assert pairs(matching, wanted) == {wanted[1].name: f"{T}dense_1/kernel"}
        assert matching.missing == tuple(target.name for target in wanted[2:])
        assert matching.left_over == (f"{OPT}adam/dense_kernel_momentum", SEED.format(""))


def test_a_group_whose_leaves_are_others_is_not_paired_by_position() -> None:
    there = stored((f"{T}dense/kernel", (2,)), (f"{T}conv/kernel", (3,)))
    wanted = targets((f"{T}s/conv_1/kernel", (2,)), (f"{T}s/dense_1/kernel", (9,)))
    names = [(t.path[0], *t.path[2:]) for t in wanted]
    matching = match(there, wanted, is_ordered=True, find_names=lambda: names)
    assert pairs(matching, wanted) == {}
