"""Systematic sampling of a selection: counts are their expectation, rounded, and unbiased over seeds."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.selection import Choice, resampled_counts

weights_of_problem = st.lists(st.floats(0.0, 1.0, allow_subnormal=False), min_size=1, max_size=6).filter(any)
copies_of_problem, seeds = st.integers(1, 50), st.integers(0, 2**31)


def _choices(*problems: list[float]) -> list[Choice]:
    return [
        Choice(f"p{row}", f"c{column}", "teacher", weight, 0.0, column + 1)
        for row, weights in enumerate(problems)
        for column, weight in enumerate(weights)
    ]


@given(st.lists(weights_of_problem, min_size=1, max_size=4), copies_of_problem, seeds)
def test_each_count_is_its_expectation_rounded_and_a_problem_has_all_its_copies(problems, copies, seed):
    counts = list(resampled_counts(_choices(*problems), copies, seed))
    for weights in problems:
        total = sum(Fraction(weight) for weight in weights)
        expected = [copies * Fraction(weight) / total for weight in weights]
        drawn, counts = counts[: len(weights)], counts[len(weights) :]
        assert sum(drawn) == copies
        assert all(math.floor(x) <= count <= math.ceil(x) for x, count in zip(expected, drawn, strict=True))


def test_counts_are_unbiased_over_seeds():
    rng, copies, draws = np.random.default_rng(), 3, 4_000
    weights = rng.dirichlet(np.ones(5))
    choices = _choices(weights.tolist())
    counts = np.array([resampled_counts(choices, copies, seed) for seed in range(draws)])
    # A count takes two neighbouring values, so its standard deviation is at most 1/2; six of the mean's.
    assert np.abs(counts.mean(axis=0) - copies * weights).max() < 6 * 0.5 / math.sqrt(draws)
    assert len(np.unique(counts, axis=0)) > 1


@pytest.mark.parametrize("budget", [1, 2, 3, 6, 7, 10])
def test_uniform_weights_give_equal_counts_under_every_seed(budget):
    choices = _choices([1 / budget] * budget)  # 1/3 and the like are not exact floats
    assert {resampled_counts(choices, 4 * budget, seed) for seed in range(200)} == {(4,) * budget}


@given(weights_of_problem, weights_of_problem, copies_of_problem, seeds)
def test_a_draw_depends_only_on_the_seed_and_its_own_problem(weights, others, copies, seed):
    alone = resampled_counts(_choices(weights), copies, seed)
    assert resampled_counts(_choices(weights), copies, seed) == alone
    assert resampled_counts(_choices(weights, others), copies, seed)[: len(weights)] == alone


def test_problems_draw_independently():
    counts = np.array(resampled_counts(_choices(*[[0.5, 0.5]] * 200), 1, 0)).reshape(200, 2)
    assert counts.sum(axis=1).tolist() == [1] * 200
    assert 50 < counts[:, 0].sum() < 150


def test_a_choice_of_weight_zero_is_never_drawn():
    choices = _choices([0.75, 0.25, 0.0])
    assert {resampled_counts(choices, 7, seed)[2] for seed in range(100)} == {0}
