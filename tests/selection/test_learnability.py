import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lark_jax.selection import lark_scores, learnability_rate


def _statistics(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Loss and Brier score of plausible trajectories, float64."""
    return rng.uniform(0.05, 3.0, shape), rng.uniform(0.01, 1.2, shape)


def _lark_scores_reference(loss: np.ndarray, brier: np.ndarray) -> np.ndarray:
    """Algorithm 1, lines 4 to 6, for the candidates of one problem, term by term."""
    rho_hat = [brier_k / loss_k for loss_k, brier_k in zip(loss, brier, strict=True)]
    total = sum(loss)
    mean_rate = sum(rho_k * loss_k for rho_k, loss_k in zip(rho_hat, loss, strict=True)) / total
    return np.array([loss_k / total * (2 * rho_k - mean_rate) for loss_k, rho_k in zip(loss, rho_hat, strict=True)])


def _token_statistics(logits: np.ndarray, target: int) -> tuple[float, float]:
    """Cross-entropy and Brier score of one token from its logits, in float64; y is left out of sums by index."""
    odds = np.exp(np.delete(logits, target) - logits[target])  # p_v / p_y over v != y
    target_prob = 1 / (1 + odds.sum())
    wrong_probs = target_prob * odds
    return np.log1p(odds.sum()), wrong_probs.sum() ** 2 + np.square(wrong_probs).sum()


def test_learnability_rate_of_means_is_the_ratio_of_sums_over_tokens():
    """Algorithm 1, line 4. Eq. 7 as printed would be larger by the number of tokens."""
    rng = np.random.default_rng()
    tokens = np.array([_token_statistics(rng.normal(0, 3, 40), target) for target in rng.integers(0, 40, 57)])
    cross_entropy, brier = tokens.T
    rate = learnability_rate(jnp.asarray([cross_entropy.mean()]), jnp.asarray([brier.mean()]))
    np.testing.assert_allclose(rate, [brier.sum() / cross_entropy.sum()], rtol=1e-6)


@given(st.floats(1e-6, 30.0), st.integers(2, 50), st.integers(0, 2**32))
def test_learnability_rate_of_a_softmax_stays_below_two_and_vanishes_with_the_loss(scale, vocab, seed):
    cross_entropy, brier = _token_statistics(np.random.default_rng(seed).normal(0, scale, vocab), target=0)
    assume(brier > 1e-30)  # below, float32 runs out of exponents
    (rate,) = learnability_rate(jnp.asarray([cross_entropy]), jnp.asarray([brier]))
    assert 0 <= rate < 2
    assert rate <= -2 * np.expm1(-cross_entropy) * (1 + 1e-5)


def test_learnability_rate_of_a_perfectly_predicted_trajectory_is_zero():
    np.testing.assert_array_equal(learnability_rate(jnp.zeros(1), jnp.zeros(1)), [0.0])


@given(st.integers(1, 64), st.integers(0, 2**32))
def test_lark_scores_equal_algorithm_1_in_float32_and_float64(num_candidates, seed):
    loss, brier = _statistics(np.random.default_rng(seed), (1, 64))
    expected = _lark_scores_reference(loss[0, :num_candidates], brier[0, :num_candidates])
    valid = jnp.arange(64)[None] < num_candidates
    scale = np.abs(expected).max()
    single = lark_scores(jnp.asarray(loss, jnp.float32), jnp.asarray(brier, jnp.float32), valid)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single[0, :num_candidates] / scale, expected / scale, atol=2e-6)
    with jax.enable_x64(True):
        double = lark_scores(jnp.asarray(loss), jnp.asarray(brier), valid)
        np.testing.assert_allclose(double[0, :num_candidates] / scale, expected / scale, atol=1e-14)


@pytest.mark.parametrize("num_candidates", [1, 2, 5, 33])
def test_lark_scores_are_the_derivative_of_the_learnability_rate_for_orthogonal_gradients(num_candidates):
    """Eq. 7 against Lemma 8: differentiate |sum_k q_k g_k|^2 / sum_k q_k l_k at uniform q, with explicit gradients."""
    rng = np.random.default_rng()
    loss, rho = rng.uniform(0.1, 2.0, num_candidates), rng.uniform(0.05, 1.5, num_candidates)
    directions, _ = np.linalg.qr(rng.normal(size=(num_candidates + 3, num_candidates)))
    gradients = directions * np.sqrt(rho * loss)  # |g_k|^2 = rho_k l_k

    def rate(q: np.ndarray) -> float:
        return np.sum((gradients @ q) ** 2) / (q @ loss)

    uniform, step = np.full(num_candidates, 1 / num_candidates), 1e-6
    derivative = [(rate(uniform + step * e) - rate(uniform - step * e)) / (2 * step) for e in np.eye(num_candidates)]
    with jax.enable_x64(True):
        scores = lark_scores(
            jnp.asarray(loss[None]), jnp.asarray((rho * loss)[None]), jnp.ones((1, num_candidates), bool)
        )
    np.testing.assert_allclose(scores[0], derivative, rtol=1e-7, atol=1e-8)


@given(st.integers(0, 2**32))
def test_lark_scores_of_a_problem_sum_to_the_ratio_of_summed_brier_and_summed_loss(seed):
    loss, brier = _statistics(np.random.default_rng(seed), (3, 33))
    scores = lark_scores(jnp.asarray(loss), jnp.asarray(brier), jnp.ones((3, 33), bool))
    np.testing.assert_allclose(scores.sum(-1), brier.sum(-1) / loss.sum(-1), rtol=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_candidates_that_are_not_valid_change_no_other_score(poison):
    loss, brier = _statistics(np.random.default_rng(), (2, 6))
    valid = np.array([[True, True, False, True, False, True], [True] * 6])
    expected = _lark_scores_reference(loss[0][valid[0]], brier[0][valid[0]])
    loss[~valid], brier[~valid] = poison, poison
    scores = np.asarray(lark_scores(jnp.asarray(loss), jnp.asarray(brier), jnp.asarray(valid)))
    np.testing.assert_allclose(scores[0][valid[0]], expected, rtol=1e-4, atol=1e-6)
    assert (scores[~valid] == -np.inf).all()


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_non_finite_statistic_does_not_poison_its_problem(column, poison):
    statistics = np.stack(_statistics(np.random.default_rng(), (1, 4)))
    expected = _lark_scores_reference(statistics[0, 0, :3], statistics[1, 0, :3])
    statistics[column, 0, 3] = poison
    scores = lark_scores(*jnp.asarray(statistics), jnp.ones((1, 4), bool))
    np.testing.assert_allclose(scores[0, :3], expected, rtol=1e-4, atol=1e-6)
    assert scores[0, 3] == -np.inf


@given(st.integers(0, 2**32))
def test_lark_scores_follow_a_permutation_of_the_candidates(seed):
    rng = np.random.default_rng(seed)
    loss, brier = _statistics(rng, (1, 40))
    order, valid = rng.permutation(40), rng.random((1, 40)) < 0.8
    with jax.enable_x64(True):
        scores = lark_scores(*map(jnp.asarray, (loss, brier, valid)))
        permuted = lark_scores(*map(jnp.asarray, (loss[:, order], brier[:, order], valid[:, order])))
    np.testing.assert_allclose(permuted, scores[:, order], rtol=1e-12, atol=1e-15)


@given(st.floats(0.01, 100.0), st.integers(0, 2**32))
def test_lark_scores_scale_with_the_brier_score_and_inversely_with_the_loss(factor, seed):
    loss, brier = _statistics(np.random.default_rng(seed), (2, 9))
    valid = jnp.ones((2, 9), bool)
    with jax.enable_x64(True):
        scores = lark_scores(jnp.asarray(loss), jnp.asarray(brier), valid)
        np.testing.assert_allclose(lark_scores(jnp.asarray(loss), factor * brier, valid), factor * scores, rtol=1e-10)
        np.testing.assert_allclose(lark_scores(factor * loss, jnp.asarray(brier), valid), scores / factor, rtol=1e-10)


def test_a_problem_of_perfectly_predicted_trajectories_scores_zero():
    scores = lark_scores(jnp.zeros((1, 3)), jnp.zeros((1, 3)), jnp.asarray([[True, True, False]]))
    np.testing.assert_array_equal(scores, [[0.0, 0.0, -np.inf]])
