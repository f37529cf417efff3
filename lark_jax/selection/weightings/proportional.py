"""Weights proportional to the score over the top B (paper, Section 5.3, Figure 2b)."""

import jax
import jax.numpy as jnp

from lark_jax.selection.ranking import chosen, shares_or_equal


def proportional_top_b(scores: jax.Array, valid: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
    """q_k = max(s_k, 0) / sum_j max(s_j, 0) over the top B.

    The paper does not say what a negative score weighs: here nothing, and where none of the chosen has a positive
    score, or their sum overflows, they share the weight equally. So scores that are never positive (minus a loss) get
    equal weights.

    Returns:
      weights [N, K] and tau [N]: 0 where the weights are uniform for want of a positive, finite sum, else infinite:
      the rule has no temperature.
    """
    is_chosen = chosen(scores, valid, budget)
    weights, has_positive = shares_or_equal(jnp.maximum(scores, 0.0), is_chosen)
    return weights, jnp.where(has_positive, jnp.inf, 0.0).astype(scores.dtype)
