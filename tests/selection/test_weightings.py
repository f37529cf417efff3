import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize

from lark_jax.selection import chi2_top_b, uniform_top_b
from lark_jax.selection.ranking import descending_ranks
from lark_jax.selection.weightings import KlTopB, SoftmaxTopB, proportional_top_b

RULES = [chi2_top_b, uniform_top_b, proportional_top_b, SoftmaxTopB(0.3), KlTopB(2.0)]
MAX_CANDIDATES = 64


def _run(rule, scores: np.ndarray, valid: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    with jax.enable_x64(True):
        weights, tau = rule(jnp.asarray(scores), jnp.asarray(valid), budget)
        return np.asarray(weights), np.asarray(tau)


def _chi2_reference(scores: np.ndarray, valid: np.ndarray, budget: int) -> tuple[np.ndarray, float]:
    """Lemma 3 and the degenerate cases for one problem, candidate by candidate, in float64."""
    weights = np.zeros(len(scores))
    ranked = sorted((k for k in range(len(scores)) if valid[k]), key=lambda k: (-scores[k], k))
    top = ranked[:budget]
    margins = [scores[k] - scores[ranked[budget]] for k in top] if len(ranked) > budget else []
    if sum(margins) > 0:
        weights[top] = np.divide(margins, sum(margins))
        return weights, sum(margins) / len(ranked)
    weights[top] = 1 / max(len(top), 1)
    return weights, 0.0


def _projection(scores: np.ndarray, tau: float) -> np.ndarray:
    """The maximizer of Eq. 114 by Eq. 117, with the multiplier found by root finding on sum_k q_k = 1."""
    size = len(scores)

    def weights(multiplier: float) -> np.ndarray:
        return np.maximum(1 / size + (scores - multiplier) / (tau * size), 0)

    low, high = scores.min() - 2 * tau * size, scores.max() + tau
    multiplier = brentq(lambda value: weights(value).sum() - 1, low, high, xtol=1e-15, rtol=1e-15)
    return weights(multiplier)


@st.composite
def problems(draw) -> tuple[np.ndarray, np.ndarray, int]:
    """Scores [3, 64] with ties, of 1 to 64 candidates with gaps in validity (so one shape compiles), and a budget."""
    num_candidates = draw(st.integers(1, MAX_CANDIDATES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scores = rng.normal(0, 0.01, (3, MAX_CANDIDATES))
    scores = draw(st.sampled_from([scores, scores.round(2), np.zeros_like(scores)]))
    valid = rng.random(scores.shape) < draw(st.sampled_from([1.0, 0.7, 0.1]))
    valid[:, num_candidates:] = False
    return scores, valid, draw(st.integers(1, num_candidates + 2))


def test_case_study_of_appendix_d3():
    rng = np.random.default_rng()
    scores = np.concatenate([[0.01782, 0.01687, 0.01426, 0.01285], rng.uniform(0.005, 0.0128, 29)])
    order = rng.permutation(33)
    weights, tau = chi2_top_b(jnp.asarray(scores[order][None], jnp.float32), jnp.ones((1, 33), bool), 3)
    by_rank = np.empty(33)
    by_rank[order] = weights[0]
    np.testing.assert_allclose(by_rank[:3], [0.478, 0.387, 0.136], atol=5e-4)
    assert (by_rank[3:] == 0).all()
    assert float(tau[0]) == pytest.approx(3.15e-4, abs=5e-7)
    assert float(tau[0]) * 33 == pytest.approx(0.01040, abs=5e-6)


@given(st.integers(2, MAX_CANDIDATES), st.data())
def test_chi2_weights_maximize_the_regularized_objective_by_kkt(num_candidates, data):
    """Lemma 3 against the projection onto the simplex (Eq. 114 to 117) with the lemma's temperature."""
    budget = data.draw(st.integers(1, num_candidates - 1))
    padded = np.random.default_rng(data.draw(st.integers(0, 2**32))).normal(0, 0.01, MAX_CANDIDATES)
    scores = padded[:num_candidates]
    weights, tau = _run(chi2_top_b, padded[None], np.arange(MAX_CANDIDATES)[None] < num_candidates, budget)
    weights = weights[:, :num_candidates]
    ordered = np.sort(scores)[::-1]
    assert tau[0] == pytest.approx((ordered[:budget] - ordered[budget]).sum() / num_candidates, rel=1e-10)
    np.testing.assert_allclose(weights[0], _projection(scores, tau[0]), atol=1e-9)
    assert (weights[0] > 0).sum() == budget


@pytest.mark.parametrize(("num_candidates", "budget"), [(4, 1), (6, 3), (12, 5)])
def test_chi2_weights_maximize_the_regularized_objective_by_quadratic_programming(num_candidates, budget):
    scores = np.random.default_rng().normal(0, 1, num_candidates)
    weights, tau = _run(chi2_top_b, scores[None], np.ones((1, num_candidates), bool), budget)
    uniform = np.full(num_candidates, 1 / num_candidates)

    def loss(q: np.ndarray) -> float:  # minus Eq. 10, with chi2(q | p) = K |q - p|^2 at uniform p
        return -(scores @ (q - uniform)) + tau[0] / 2 * num_candidates * np.sum((q - uniform) ** 2)

    numeric = minimize(
        loss,
        uniform,
        jac=lambda q: -scores + tau[0] * num_candidates * (q - uniform),
        method="SLSQP",
        bounds=[(0, 1)] * num_candidates,
        constraints={"type": "eq", "fun": lambda q: q.sum() - 1, "jac": lambda q: np.ones_like(q)},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert numeric.success
    np.testing.assert_allclose(weights[0], numeric.x, atol=1e-5)
    assert loss(weights[0]) <= numeric.fun + 1e-12


def test_chi2_weights_maximize_the_regularized_objective_when_candidates_tie_at_the_threshold():
    scores = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    weights, tau = _run(chi2_top_b, scores[None], np.ones((1, 5), bool), 3)
    np.testing.assert_array_equal(weights, [[1.0, 0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(weights[0], _projection(scores, tau[0]), atol=1e-12)


@given(problems())
def test_chi2_weights_equal_the_reference_with_ties_and_missing_candidates(problem):
    scores, valid, budget = problem
    weights, tau = _run(chi2_top_b, np.where(valid, scores, np.nan), valid, budget)
    for row in range(3):
        expected_weights, expected_tau = _chi2_reference(scores[row], valid[row], budget)
        np.testing.assert_allclose(weights[row], expected_weights, atol=1e-12)
        assert tau[row] == pytest.approx(expected_tau, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("rule", RULES)
@given(problem=problems())
def test_weights_sum_to_one_over_at_most_the_budget_wherever_a_candidate_is_valid(rule, problem):
    scores, valid, budget = problem
    weights, _ = _run(rule, np.where(valid, scores, np.inf), valid, budget)
    assert (weights >= 0).all()
    assert ((weights > 0).sum(-1) <= budget).all()
    assert (weights[~valid] == 0).all()
    np.testing.assert_allclose(weights.sum(-1), valid.any(-1).astype(float), atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_weights_sum_to_one_in_float32(rule):
    scores = np.random.default_rng().normal(0, 0.01, (500, 33)).astype(np.float32)
    weights, _ = rule(jnp.asarray(scores), jnp.ones((500, 33), bool), 5)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_non_finite_score_is_never_chosen(rule, poison):
    weights, _ = _run(rule, np.array([[poison, 0.2, 0.1, 0.0]]), np.ones((1, 4), bool), 2)
    assert weights[0, 0] == 0
    assert weights[0, 1] > 0
    np.testing.assert_allclose(weights.sum(), 1.0)


def test_weights_stay_finite_where_margins_overflow():
    largest = np.finfo(np.float32).max
    scores = jnp.asarray([[largest, largest / 2, -largest]], jnp.float32)
    weights, tau = chi2_top_b(scores, jnp.ones((1, 3), bool), 2)
    np.testing.assert_array_equal(weights, [[0.5, 0.5, 0.0]])
    np.testing.assert_array_equal(tau, [0.0])


@pytest.mark.parametrize("rule", RULES)
@given(problem=problems(), seed=st.integers(0, 2**32))
def test_weights_follow_a_permutation_of_distinct_scores(rule, problem, seed):
    _, valid, budget = problem
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.arange(valid.size, dtype=float).reshape(valid.shape) ** 1.5, axis=-1)
    order = rng.permutation(valid.shape[1])
    weights, tau = _run(rule, scores, valid, budget)
    permuted_weights, permuted_tau = _run(rule, scores[:, order], valid[:, order], budget)
    np.testing.assert_allclose(permuted_weights, weights[:, order], rtol=1e-12)
    np.testing.assert_allclose(permuted_tau, tau, rtol=1e-12)


@given(st.floats(0.01, 100.0), st.floats(-1.0, 1.0), st.integers(0, 2**32))
def test_chi2_weights_ignore_an_affine_change_of_the_scores_and_tau_scales(factor, shift, seed):
    scores = np.random.default_rng(seed).normal(0, 1, (2, 10))
    valid = np.ones((2, 10), bool)
    weights, tau = _run(chi2_top_b, scores, valid, 3)
    changed_weights, changed_tau = _run(chi2_top_b, factor * scores + shift, valid, 3)
    np.testing.assert_allclose(changed_weights, weights, atol=1e-9)
    np.testing.assert_allclose(changed_tau, factor * tau, rtol=1e-9)


@pytest.mark.parametrize("rule", [chi2_top_b, uniform_top_b, KlTopB(2.0)])
@pytest.mark.parametrize("num_candidates", [1, 2])
def test_a_budget_of_all_candidates_or_more_shares_the_weight_equally(rule, num_candidates):
    scores = np.random.default_rng().normal(0, 1, (4, num_candidates))
    for budget in (num_candidates, num_candidates + 1):
        weights, _ = _run(rule, scores, np.ones(scores.shape, bool), budget)
        np.testing.assert_array_equal(weights, np.full(scores.shape, 1 / num_candidates))


def test_equal_scores_are_ranked_by_candidate_index():
    ranks = descending_ranks(
        jnp.asarray([[1.0, 2.0, 2.0, jnp.nan, 2.0]]), jnp.asarray([[True, True, True, True, False]])
    )
    np.testing.assert_array_equal(ranks[0, :3], [2, 0, 1])
    assert set(np.asarray(ranks[0, 3:]).tolist()) == {3, 4}


@pytest.mark.parametrize(("num_candidates", "budget", "strength"), [(33, 3, 1.0), (33, 5, 8.0), (6, 2, 0.5)])
def test_kl_weights_maximize_the_regularized_objective_over_the_chosen(num_candidates, budget, strength):
    """<q - p, s> - strength tau KL(q || p), against thousands of other q on the same support, near and far."""
    rng = np.random.default_rng()
    scores = rng.normal(0, 0.01, num_candidates)
    weights, tempered = _run(KlTopB(strength), scores[None], np.ones((1, num_candidates), bool), budget)
    _, tau = _chi2_reference(scores, np.ones(num_candidates, bool), budget)
    assert tempered[0] == pytest.approx(strength * tau)
    support = np.argsort(-scores)[:budget]
    assert set(np.flatnonzero(weights[0])) == set(support)

    def objective(q: np.ndarray) -> np.ndarray:
        divergence = (q * np.log(q * num_candidates)).sum(-1)
        return q @ scores[support] - scores.mean() - strength * tau * divergence

    best = weights[0][support]
    others = np.concatenate([rng.dirichlet(np.ones(budget), 2_000), rng.dirichlet(1e4 * best + 1e-3, 2_000)])
    others = np.maximum(others, 1e-300)
    assert (objective(others) <= objective(best) + 1e-15).all()
    assert (objective(others[np.abs(others - best).max(-1) > 1e-2]) < objective(best)).all()


def test_kl_weights_ignore_shift_and_scale_of_the_scores_and_softmax_weights_only_the_shift():
    scores, valid = np.random.default_rng().normal(0, 0.01, (4, 9)), np.ones((4, 9), bool)
    for rule, changed, same in (
        (KlTopB(3.0), 7 * scores + 2, True),
        (SoftmaxTopB(0.01), scores + 2, True),
        (SoftmaxTopB(0.01), 7 * scores, False),
    ):
        pairs = _run(rule, scores, valid, 3)[0], _run(rule, changed, valid, 3)[0]
        assert np.allclose(*pairs, rtol=1e-9) == same


def test_softmax_weights_stay_finite_at_extreme_scores_and_temperatures():
    scores = np.array([[1e308, -1e308, 0.0, 1e308]])
    for temperature in (1e-300, 1.0, 1e300):
        weights, _ = _run(SoftmaxTopB(temperature), scores, np.ones((1, 4), bool), 3)
        assert np.isfinite(weights).all()
        np.testing.assert_allclose(weights.sum(), 1.0)
        assert weights[0, 1] == 0.0


@pytest.mark.parametrize(
    ("scores", "expected", "falls_back"),
    [
        ([3.0, 1.0, 0.5, -1.0], [0.75, 0.25, 0, 0], False),
        ([3.0, -1.0, -2.0, -2.0], [1.0, 0, 0, 0], False),
        ([-3.0, -1.0, -2.0, -4.0], [0, 0.5, 0.5, 0], True),
        ([0.0, 0.0, -1.0, -1.0], [0.5, 0.5, 0, 0], True),
        ([1e308, 1e308, 1.0, 0.0], [0.5, 0.5, 0, 0], True),
    ],
)
def test_proportional_weights_leave_out_negative_scores_and_fall_back_to_equal_ones(scores, expected, falls_back):
    weights, tau = _run(proportional_top_b, np.array([scores]), np.ones((1, 4), bool), 2)
    np.testing.assert_allclose(weights, [expected])
    assert (tau[0] == 0) == falls_back
