"""The rank-surprisal ratio, RSR (Appendix C.2; Yang et al., 2026, arXiv 2601.14249)."""

import jax
import jax.numpy as jnp

from lark_jax.selection.scores.score import from_columns


def minus_rank_surprisal_ratio(mean_clipped_rank: jax.Array, loss: jax.Array, valid: jax.Array) -> jax.Array:  # noqa: ARG001
    """-(sum_t min(rank_t, 100)) / (sum_t surprisal_t): RSR is minimized, and higher scores are better here.

    Both columns are means over the same target tokens, so their ratio is the ratio of the sums. A loss of 0 makes
    the ratio infinite; it gets the lowest finite number, so that it ranks last among the valid.
    """
    return jnp.maximum(-mean_clipped_rank / loss, jnp.finfo(loss.dtype).min)


RANK_SURPRISAL = from_columns(minus_rank_surprisal_ratio, "mean_clipped_rank", "loss")
