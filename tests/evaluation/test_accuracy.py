import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.evaluation.accuracy import acc_at_k, bootstrap_interval, summarize


def brute_force(correct_spk):
    """Acc@k per seed, with loops over Python booleans."""
    return [sum(any(samples) for samples in problems) / len(problems) for problems in correct_spk.tolist()]


@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 6), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_accuracy_equals_brute_force(seeds, problems, samples, share, seed):
    correct_spk = np.random.default_rng(seed).random((seeds, problems, samples)) < share
    expected = brute_force(correct_spk)
    result = summarize(correct_spk)
    assert result.per_seed == pytest.approx(expected, abs=1e-12)
    assert result.mean == pytest.approx(statistics.mean(expected), abs=1e-12)
    assert result.per_sample == pytest.approx(np.mean(correct_spk.tolist()), abs=1e-12)
    if seeds > 1:
        assert result.std == pytest.approx(statistics.stdev(expected), abs=1e-9)
    else:
        assert result.std is None
    assert result.low <= result.mean + 1e-12
    assert result.mean - 1e-12 <= result.high


def test_one_correct_sample_is_enough_and_unanswered_problems_stay_in_the_denominator():
    correct_spk = np.zeros((1, 4, 5), dtype=bool)
    correct_spk[0, 2, 4] = True
    assert acc_at_k(correct_spk).tolist() == [0.25]


def test_interval_has_the_width_of_a_binomial():
    rng = np.random.default_rng()
    solved = np.arange(400) < 120
    rng.shuffle(solved)
    low, high = bootstrap_interval(solved[None, :, None], seed=0)
    half_width = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - half_width, abs=0.01)
    assert high == pytest.approx(0.3 + half_width, abs=0.01)


def test_interval_is_a_function_of_its_seed():
    correct_spk = np.random.default_rng(3).random((3, 50, 5)) < 0.1
    first, again = (bootstrap_interval(correct_spk, 1, resamples=50) for _ in range(2))
    assert first == again
    assert len({bootstrap_interval(correct_spk, seed, resamples=50) for seed in range(8)}) > 1


@pytest.mark.parametrize("shape", [(3, 4), (0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_empty_or_misshapen_tables_are_refused(shape):
    with pytest.raises(ValueError, match="expected bool"):
        summarize(np.zeros(shape, dtype=bool))
