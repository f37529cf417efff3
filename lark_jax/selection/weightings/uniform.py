"""Equal weights over the top B: the baselines' rule (paper, Section 5.1; Remark 1)."""

import jax
import jax.numpy as jnp

from lark_jax.selection.ranking import chosen, equal_shares


def uniform_top_b(scores: jax.Array, valid: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
    """Hard top-B: 1/B each. tau is infinite: Eq. 10 in the limit."""
    weights = equal_shares(chosen(scores, valid, budget), scores.dtype)
    return weights, jnp.full(scores.shape[:1], jnp.inf, scores.dtype)
