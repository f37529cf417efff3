"""Per-token statistics of a softmax over a large vocabulary, without ever holding the logits."""

from lark_jax.scoring.token_statistics.chunked import TokenStatistics, token_statistics

__all__ = ["TokenStatistics", "token_statistics"]
