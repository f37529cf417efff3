"""The KL-tempered rule: Lemma 3 with the Kullback-Leibler divergence in the place of chi-squared."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lark_jax.selection.ranking import chosen, equal_shares
from lark_jax.selection.weightings.chi2 import chi2_top_b
from lark_jax.selection.weightings.softmax import softmax_of_chosen


@dataclass(frozen=True)
class KlTopB:
    """q_k proportional to exp(s_k / (strength tau(B))) over the top B, with tau(B) of Lemma 3 for each problem.

    Among the q on the simplex that are 0 outside the top B, it maximizes <q - p, s> - lambda KL(q || p), p uniform over
    the K candidates and lambda = strength * tau(B). Proof: sum_k q_k log(q_k / p_k) = sum_k q_k log q_k + log K there,
    so by the stationarity of sum_k q_k s_k - lambda sum_k q_k log q_k - mu sum_k q_k, s_k - lambda (log q_k + 1) = mu
    for all k of the top B; the objective is strictly concave, so this is the one maximum (Gibbs' variational
    principle; Csiszar, "I-divergence geometry", 1975). No q_k is 0, so the support does not fix lambda as it fixes
    chi-squared's; it is taken over from there, since KL(q || p) = chi2(q || p) / 2 + O(|q - p|^3): with a strength of
    1 the objective agrees with Eq. 10 to second order around p.

    Softmax has the same form, but one temperature in the units of the score for all problems. Here the temperature
    follows the margins of each problem, so that the weights do not change when its scores are shifted or scaled.
    The paper lists "KL-tempered weighting variants" (C.3, "Hardware") without a definition.
    """

    strength: float  # > 0

    def __call__(self, scores: jax.Array, valid: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
        """Weights [N, K] and lambda [N]: 0 where the weights are uniform since Lemma 3 has no margin there."""
        is_chosen = chosen(scores, valid, budget)
        temperature = self.strength * chi2_top_b(scores, valid, budget)[1]
        has_margin = temperature > 0
        tempered = softmax_of_chosen(scores, is_chosen, jnp.where(has_margin, temperature, 1.0))
        weights = jnp.where(has_margin[:, None], tempered, equal_shares(is_chosen, scores.dtype))
        return weights, jnp.where(has_margin, temperature, 0.0)
