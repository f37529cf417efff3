"""LARK's weighting: margins over the score of rank B + 1 (paper, Section 4.3)."""

import jax
import jax.numpy as jnp

from lark_jax.selection.ranking import descending_ranks, shares_or_equal, usable


def chi2_top_b(scores: jax.Array, valid: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
    """The chi-squared regularized rule: weight proportional to the margin over the score of rank B + 1 (Lemma 3).

    Lemma 3 assumes B < K and a gap between ranks B and B + 1. Without the gap the margins are still the maximizer of
    its objective (Eq. 114): candidates tied with rank B + 1 get weight 0. Only where no margin is positive (or the
    margins overflow), or there is no rank B + 1, the chosen candidates share the weight equally.

    Args:
      scores: g_hat [N, K], floating point; values that are not valid are ignored.
      valid: bool [N, K].
      budget: B >= 1, a Python integer.

    Returns:
      weights [N, K] and tau [N] = (1 / K) sum_j (g_hat_j - g_hat_{B+1}) over the chosen j, with K the number of usable
      candidates; tau is 0 where the weights are uniform for want of a margin.
    """
    takes_part = usable(scores, valid)
    ranks = descending_ranks(scores, valid)
    is_chosen = takes_part & (ranks < budget)
    is_threshold = takes_part & (ranks == budget)
    has_threshold = is_threshold.any(axis=-1, keepdims=True)
    threshold = jnp.where(is_threshold, scores, 0.0).sum(axis=-1, keepdims=True)
    margins = jnp.where(is_chosen & has_threshold, scores - threshold, 0.0)
    weights, has_margin = shares_or_equal(margins, is_chosen)
    num_usable = jnp.maximum(takes_part.sum(axis=-1), 1)
    return weights, jnp.where(has_margin, margins.sum(axis=-1) / num_usable, 0.0)
