"""The Brier residual (the paper's Section 5.3, Figure 2a)."""

import jax

from lark_jax.selection.scores.score import from_columns


def brier_residual(brier: jax.Array, num_target_tokens: jax.Array, valid: jax.Array) -> jax.Array:  # noqa: ARG001
    """sum_t ||pi_t - delta(y_t)||^2 over the target tokens.

    A sum, as Section 5.3 prints it, so that it grows with the length; the table holds the mean.
    """
    return brier * num_target_tokens


BRIER = from_columns(brier_residual, "brier", "num_target_tokens")
