"""From scores to weights over the top B candidates of each problem (paper, Section 4.3). Pure functions over [N, K].

Every rule takes `(scores, valid, budget)` and returns `(weights, tau)`: weights [N, K] are >= 0, never NaN, zero
outside the top B, and sum to 1 for each problem with a usable candidate (to 0 for the others); tau [N] is the rule's
temperature. Usable means valid and of finite score. Equal scores are ranked by candidate index.
"""

import jax
import jax.numpy as jnp


def descending_ranks(scores: jax.Array, valid: jax.Array) -> jax.Array:
    """Rank of each candidate within its problem, int [N, K]: 0 is the best, unusable candidates come last."""
    scores = jnp.where(valid & jnp.isfinite(scores), scores, -jnp.inf)
    order = jnp.argsort(scores, axis=-1, stable=True, descending=True)
    return jnp.argsort(order, axis=-1)  # the inverse permutation


def chosen(scores: jax.Array, valid: jax.Array, budget: int) -> jax.Array:
    """The top `budget` usable candidates of each problem, bool [N, K]."""
    return valid & jnp.isfinite(scores) & (descending_ranks(scores, valid) < budget)


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
    usable = valid & jnp.isfinite(scores)
    ranks = descending_ranks(scores, valid)
    is_chosen = usable & (ranks < budget)
    is_threshold = usable & (ranks == budget)
    threshold = jnp.where(is_threshold, scores, 0.0).sum(axis=-1, keepdims=True)
    margins = jnp.where(is_chosen, scores - threshold, 0.0)
    total = margins.sum(axis=-1, keepdims=True)
    has_margin = is_threshold.any(axis=-1, keepdims=True) & (total > 0) & jnp.isfinite(total)
    by_margin = margins / jnp.where(has_margin, total, 1.0)
    weights = jnp.where(has_margin, by_margin, _equal_shares(is_chosen, scores.dtype))
    num_usable = jnp.maximum(usable.sum(axis=-1, keepdims=True), 1)
    tau = jnp.where(has_margin, total / num_usable, 0.0)
    return weights, tau[:, 0]


def uniform_top_b(scores: jax.Array, valid: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
    """Hard top-B: equal weights, the baselines' rule (Section 5.1). tau is infinite: Eq. 10 in the limit."""
    weights = _equal_shares(chosen(scores, valid, budget), scores.dtype)
    return weights, jnp.full(scores.shape[:1], jnp.inf, scores.dtype)


def _equal_shares(is_chosen: jax.Array, dtype: jnp.dtype) -> jax.Array:
    shares = is_chosen.astype(dtype)
    return shares / jnp.maximum(shares.sum(axis=-1, keepdims=True), 1)
