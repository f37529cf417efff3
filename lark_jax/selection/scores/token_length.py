"""Token length (Appendix C.2)."""

import jax

from lark_jax.selection.scores.score import from_columns


def token_length(num_target_tokens: jax.Array, valid: jax.Array) -> jax.Array:  # noqa: ARG001 (a score's signature)
    """|a_k|: target tokens that were scored, the end of the turn included, what was truncated not."""
    return num_target_tokens


TOKEN_LENGTH = from_columns(token_length, "num_target_tokens")
