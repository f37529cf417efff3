"""One over the loss (the paper's Section 5.3, Figure 2a)."""

import jax
import jax.numpy as jnp

from lark_jax.selection.scores.score import from_columns


def inverse_loss(loss: jax.Array, valid: jax.Array) -> jax.Array:  # noqa: ARG001 (a score's signature)
    """1 / mean cross-entropy. It orders candidates as `log_likelihood` does; margins differ.

    A loss of 0 gets the largest finite number, so that it ranks first.
    """
    return jnp.minimum(1 / loss, jnp.finfo(loss.dtype).max)


INVERSE_LOSS = from_columns(inverse_loss, "loss")
