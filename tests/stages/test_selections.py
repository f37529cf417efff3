"""Overlap and teacher shares against counts by hand."""

import numpy as np
import pytest

from lark_jax.stages.selections import Pick, jaccard, teacher_shares


def picks(*names: str, weight: float = 0.5) -> list[Pick]:
    """Picks by "p/c" names; the teacher is the candidate's first letter."""
    return [Pick(*name.split("/"), teacher=name.split("/")[1][0], weight=weight) for name in names]


def test_the_overlap_is_the_jaccard_index_of_problem_and_candidate_ids() -> None:
    selections = [picks("p/a1", "p/b1"), picks("p/a1", "q/b1", "p/c1"), picks("q/a1"), []]
    expected = [[1, 1 / 4, 0, 0], [1 / 4, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(jaccard(selections), expected)


def test_teacher_shares_are_shares_of_the_weight_and_sum_to_one() -> None:
    shares = teacher_shares([*picks("p/b1", weight=0.75), *picks("p/a1", "q/a2", weight=0.25), *picks("q/c1")])
    assert list(shares) == ["a", "b", "c"]
    assert shares == pytest.approx({"a": 0.5 / 1.75, "b": 0.75 / 1.75, "c": 0.5 / 1.75})
    assert sum(shares.values()) == pytest.approx(1)
