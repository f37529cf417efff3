"""Weightings: from scores to weights over the top B candidates of each problem.

Each takes `(scores, valid, budget)`, [N, K], [N, K] and an integer, and returns `(weights, tau)`: weights [N, K] are
>= 0, never NaN, zero outside the top B, and sum to 1 for each problem with a usable candidate (to 0 for the others);
tau [N] is the temperature of the weighting, 0 where it had to fall back to equal weights. Usable means valid and of
finite score. Equal scores are ranked by candidate index. Weightings are pure, hashable and traced by `jax.jit`.

To add one, write it and give it a row in `WEIGHTINGS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lark_jax.config import SelectConfig
from lark_jax.selection.ranking import chosen, descending_ranks, equal_shares, shares_or_equal, usable

Weighting = Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]


def chi2_top_b(scores: jax.Array, valid: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
    """LARK's weighting, chi-squared regularized: the margin over the score of rank B + 1, normalised (Lemma 3).

    Lemma 3 assumes B < K and a gap between ranks B and B + 1. Without the gap the margins are still the maximizer of
    its objective (Eq. 114): candidates tied with rank B + 1 get weight 0. The chosen share the weight equally only if
    no margin is positive, the margins overflow, or there is no rank B + 1.

    Args:
      scores: g_hat [N, K], floating point; values that are not valid are ignored.
      valid: bool [N, K].
      budget: B >= 1, a Python integer.

    Returns:
      weights [N, K] and tau [N] = (1 / K) sum_j (g_hat_j - g_hat_{B+1}) over the chosen j, with K the number of usable
      candidates; tau is 0 where the weights are equal for lack of a margin.
    """
    is_usable = usable(scores, valid)
    ranks = descending_ranks(scores, valid)
    is_chosen = is_usable & (ranks < budget)
    is_threshold = is_usable & (ranks == budget)
    has_threshold = is_threshold.any(axis=-1, keepdims=True)
    threshold = jnp.where(is_threshold, scores, 0.0).sum(axis=-1, keepdims=True)
    margins = jnp.where(is_chosen & has_threshold, scores - threshold, 0.0)
    weights, has_margin = shares_or_equal(margins, is_chosen)
    num_usable = jnp.maximum(is_usable.sum(axis=-1), 1)
    return weights, jnp.where(has_margin, margins.sum(axis=-1) / num_usable, 0.0)


def uniform_top_b(scores: jax.Array, valid: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
    """Hard top-B, 1/B each: the baselines' weighting (Section 5.1, Remark 1). tau is infinite: Eq. 10 in the limit."""
    weights = equal_shares(chosen(scores, valid, budget), scores.dtype)
    return weights, jnp.full(scores.shape[:1], jnp.inf, scores.dtype)


def proportional_top_b(scores: jax.Array, valid: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
    """q_k = max(s_k, 0) / sum_j max(s_j, 0) over the top B (Section 5.3, Figure 2b).

    The paper does not define the weight of a negative score; here it is 0. If none of the chosen has a positive score,
    or their sum overflows, they share the weight equally. So scores that are never positive (minus a loss) get equal
    weights.

    Returns:
      weights [N, K] and tau [N]: 0 where the weights are equal for lack of a positive, finite sum, otherwise infinite,
      since this weighting has no temperature.
    """
    is_chosen = chosen(scores, valid, budget)
    weights, has_positive = shares_or_equal(jnp.maximum(scores, 0.0), is_chosen)
    return weights, jnp.where(has_positive, jnp.inf, 0.0).astype(scores.dtype)


@dataclass(frozen=True)
class SoftmaxTopB:
    """q_k = exp(s_k / temperature) / sum_j exp(s_j / temperature) over the top B (Section 5.3, Figure 2b).

    The temperature is the same for all problems and in the units of the score; the paper gives no value. LARK's scores
    are of the order of 0.01, so a temperature of 1 gives nearly equal weights.
    """

    temperature: float  # > 0

    def __call__(self, scores: jax.Array, valid: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
        tau = jnp.full(scores.shape[:1], self.temperature, scores.dtype)
        return softmax_of_chosen(scores, chosen(scores, valid, budget), tau), tau


def softmax_of_chosen(scores: jax.Array, is_chosen: jax.Array, temperature: jax.Array) -> jax.Array:
    """exp(s_k / temperature) over the chosen, normalised: [N, K], 0 for the others. temperature [N] > 0."""
    highest = jnp.where(is_chosen, scores, -jnp.inf).max(axis=-1, keepdims=True, initial=-jnp.inf)
    below = jnp.where(is_chosen, scores - jnp.where(is_chosen, highest, 0.0), 0.0)  # <= 0, and 0 for the best
    powers = jnp.where(is_chosen, jnp.exp(below / temperature[:, None]), 0.0)
    return powers / jnp.maximum(powers.sum(axis=-1, keepdims=True), 1.0)  # the best adds 1, if there is one


@dataclass(frozen=True)
class KlTopB:
    """q_k proportional to exp(s_k / (strength tau(B))) over the top B, with each problem's tau(B) of Lemma 3.

    Lemma 3 with the Kullback-Leibler divergence in place of chi-squared. Among the q on the simplex that are 0 outside
    the top B, it maximizes <q - p, s> - lambda KL(q || p), p uniform over the K candidates and lambda = strength *
    tau(B). Proof: there, sum_k q_k log(q_k / p_k) = sum_k q_k log q_k + log K, so by the stationarity of
    sum_k q_k s_k - lambda sum_k q_k log q_k - mu sum_k q_k, s_k - lambda (log q_k + 1) = mu for all k of the top B; the
    objective is strictly concave, so this is its only maximum (Gibbs' variational principle; Csiszar, "I-divergence
    geometry", 1975). No q_k is 0, so the support does not determine lambda as it does for chi-squared. We take it from
    there, since KL(q || p) = chi2(q || p) / 2 + O(|q - p|^3): with a strength of 1 the objective agrees with Eq. 10 to
    second order around p.

    Softmax has the same form, but one temperature, in the units of the score, for all problems. Here the temperature
    follows the margins of each problem, so the weights do not change when its scores are shifted or scaled.
    The paper lists "KL-tempered weighting variants" (C.3, "Hardware") without a definition.
    """

    strength: float  # > 0

    def __call__(self, scores: jax.Array, valid: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
        """Weights [N, K] and lambda [N]: 0 where the weights are equal because Lemma 3 has no margin."""
        is_chosen = chosen(scores, valid, budget)
        temperature = self.strength * chi2_top_b(scores, valid, budget)[1]
        has_margin = temperature > 0
        tempered = softmax_of_chosen(scores, is_chosen, jnp.where(has_margin, temperature, 1.0))
        weights = jnp.where(has_margin[:, None], tempered, equal_shares(is_chosen, scores.dtype))
        return weights, jnp.where(has_margin, temperature, 0.0)


WEIGHTINGS: dict[str, Callable[[SelectConfig], Weighting]] = {
    "chi2": lambda _: chi2_top_b,
    "uniform": lambda _: uniform_top_b,
    "proportional": lambda _: proportional_top_b,
    "softmax": lambda select: SoftmaxTopB(select.temperature),
    "kl": lambda select: KlTopB(select.temperature),
}
