import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.evaluation.accuracy import (
    accuracies,
    bootstrap_intervals,
    bootstrap_means,
    level_accuracies,
    paired_difference,
    solved_probability,
)


def any_correct(correct_spn):
    """Acc@n per seed, with loops over Python booleans."""
    return [sum(any(samples) for samples in problems) / len(problems) for problems in correct_spn.tolist()]


def over_all_subsets(correct_spn, k):
    """Acc@k per seed: the mean of Acc@k over every subset of k samples, each problem on its own."""
    per_seed = []
    for problems in correct_spn.tolist():
        solved = [statistics.mean(any(subset) for subset in itertools.combinations(p, k)) for p in problems]
        per_seed.append(statistics.mean(solved))
    return per_seed


def random_table(seeds, problems, samples, share=0.3, seed=None):
    return np.random.default_rng(seed).random((seeds, problems, samples)) < share


@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 6), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_accuracies_equal_the_mean_over_all_subsets(seeds, problems, samples, share, seed):
    correct_spn = random_table(seeds, problems, samples, share, seed)
    results = accuracies(correct_spn)
    assert [result.k for result in results] == list(range(1, samples + 1))
    for result in results:
        expected = over_all_subsets(correct_spn, result.k)
        assert result.per_seed == pytest.approx(expected, abs=1e-12)
        assert result.mean == pytest.approx(statistics.mean(expected), abs=1e-12)
        if seeds > 1:
            assert result.std == pytest.approx(statistics.stdev(expected), abs=1e-9)
        else:
            assert result.std is None
        assert result.low <= result.mean + 1e-12
        assert result.mean - 1e-12 <= result.high
    assert results[-1].per_seed == pytest.approx(any_correct(correct_spn), abs=1e-12)
    assert results[0].mean == pytest.approx(np.mean(correct_spn.tolist()), abs=1e-12)


def test_acc_at_k_of_few_samples_is_unbiased():
    """Averaged over many draws of n samples it is 1 - (1 - p)^k, which Acc@n of n < k samples could never reach."""
    p, n, k = 0.2, 5, 3
    counts = np.random.default_rng(5).binomial(n, p, 200_000)
    expected = 1 - (1 - p) ** k
    assert solved_probability(counts, n, k).mean() == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(200_000))


def test_one_correct_sample_is_enough_and_unanswered_problems_stay_in_the_denominator():
    correct_spn = np.zeros((1, 4, 5), dtype=bool)
    correct_spn[0, 2, 4] = True
    results = accuracies(correct_spn)
    assert results[4].per_seed == (0.25,)
    assert results[0].per_seed == pytest.approx([0.05])


@pytest.mark.parametrize("k", [0, 6])
def test_k_beyond_the_samples_is_refused(k):
    with pytest.raises(ValueError, match=r"k must be in 1 \.\.\. 5"):
        solved_probability(np.zeros(4, dtype=int), 5, k)


def test_bootstrap_means_are_means_of_drawn_problems():
    """Seen through a column that names the problem and one that is constant; more draws than one block holds."""
    num_problems = 7
    values = np.stack([10.0 ** np.arange(num_problems), np.ones(num_problems)], axis=1)
    means = bootstrap_means(values, seed=3, resamples=200_000)
    assert means.shape == (200_000, 2)
    np.testing.assert_allclose(means[:, 1], 1.0)
    digits = np.array([[int(c) for c in f"{round(total):0{num_problems}d}"] for total in means[:500, 0] * num_problems])
    assert (digits.sum(axis=1) == num_problems).all()
    assert len(np.unique(means[-1000:, 0])) > 300  # later blocks draw anew
    assert means[:, 0].mean() == pytest.approx(values[:, 0].mean(), rel=0.01)


def test_interval_has_the_width_of_a_binomial():
    rng = np.random.default_rng()
    solved = np.arange(400) < 120
    rng.shuffle(solved)
    ((low, high),) = bootstrap_intervals(solved[:, None].astype(float), seed=0)
    half_width = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - half_width, abs=0.01)
    assert high == pytest.approx(0.3 + half_width, abs=0.01)


def test_the_interval_depends_on_its_seed_only():
    values = np.random.default_rng(3).random((50, 2))
    first, again = (bootstrap_intervals(values, 1, resamples=50) for _ in range(2))
    assert first == again
    assert len({tuple(bootstrap_intervals(values, seed, resamples=50)) for seed in range(8)}) > 1


@pytest.mark.parametrize("shape", [(3, 4), (0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_empty_or_misshapen_tables_are_refused(shape):
    with pytest.raises(ValueError, match="expected bool"):
        accuracies(np.zeros(shape, dtype=bool))


def test_the_accuracy_of_a_level_is_that_of_its_problems():
    correct_spn = random_table(3, 40, 4)
    levels = [None if index % 5 == 0 else str(index % 5) for index in range(40)]
    found = level_accuracies(correct_spn, levels)
    assert [(level.level, level.num_problems) for level in found] == [(str(n), 8) for n in (1, 2, 3, 4)]
    for level in found:
        own = [index for index in range(40) if levels[index] == level.level]
        assert level.by_k == accuracies(correct_spn[:, own])
    assert level_accuracies(correct_spn, [None] * 40) == ()
    with pytest.raises(ValueError, match="39 levels for 40 problems"):
        level_accuracies(correct_spn, levels[:39])


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_paired_difference_is_the_difference_of_accuracies(seeds, problems, samples, seed):
    one, other = random_table(seeds, problems, samples, 0.5, seed), random_table(2, problems, samples, 0.3, seed + 1)
    for k in range(1, samples + 1):
        difference = paired_difference(one, other, k)
        expected = statistics.mean(over_all_subsets(one, k)) - statistics.mean(over_all_subsets(other, k))
        assert difference.mean == pytest.approx(expected, abs=1e-12)
        assert difference.low <= difference.mean + 1e-12
        assert difference.mean - 1e-12 <= difference.high
        mirrored = paired_difference(other, one, k)
        assert (mirrored.gained, mirrored.lost) == (difference.lost, difference.gained)


def test_paired_interval_is_that_of_the_differences_and_narrower_than_two_apart():
    """Both students fail on the same half; on the other the one solves 80 problems more and 40 fewer of 400."""
    other = np.zeros((1, 800, 1), dtype=bool)
    other[0, :200] = True
    one = other.copy()
    one[0, 200:280] = True
    one[0, :40] = False
    difference = paired_difference(one, other, 1)
    assert (difference.gained, difference.lost) == (80, 40)
    assert difference.mean == pytest.approx(40 / 800)
    half_width = 1.96 * math.sqrt((120 / 800 - (40 / 800) ** 2) / 800)
    assert difference.low == pytest.approx(0.05 - half_width, abs=0.005)
    assert difference.high == pytest.approx(0.05 + half_width, abs=0.005)
    ((own,), (others,)) = (accuracies(table) for table in (one, other))
    assert difference.high - difference.low < math.hypot(own.high - own.low, others.high - others.low)
    assert paired_difference(one, one, 1).low == paired_difference(one, one, 1).high == 0.0
    with pytest.raises(ValueError, match="800 problems against 799"):
        paired_difference(one, other[:, 1:], 1)
