"""The learnability rate of a candidate by itself (Lemma 1; the paper's Section 5.3, Figure 2a)."""

import jax
import jax.numpy as jnp

from lark_jax.selection.learnability import learnability_rate
from lark_jax.selection.scores.score import from_columns


def rho_hat(loss: jax.Array, brier: jax.Array, valid: jax.Array) -> jax.Array:
    """Sum of Brier scores over sum of cross-entropies (Algorithm 1, line 4)."""
    return learnability_rate(jnp.where(valid, loss, 1.0), brier)


RHO_HAT = from_columns(rho_hat, "loss", "brier")
