"""Global naturalness, GRAPE (Appendix C.2; Zhang et al., 2025)."""

import jax

from lark_jax.selection.scores.score import from_columns


def log_likelihood(loss: jax.Array, valid: jax.Array) -> jax.Array:  # noqa: ARG001 (a score's signature)
    """Mean log-likelihood per target token."""
    return -loss


LOG_LIKELIHOOD = from_columns(log_likelihood, "loss")
