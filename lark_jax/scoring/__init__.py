"""One forward pass per trajectory under the student: the op, the scorer, the score table."""

from lark_jax.scoring.scorer import ScoreOptions, score_pool
from lark_jax.scoring.table import CandidateScore, read_scores, write_scores
from lark_jax.scoring.token_statistics import TokenStatistics, token_statistics

__all__ = [
    "CandidateScore",
    "ScoreOptions",
    "TokenStatistics",
    "read_scores",
    "score_pool",
    "token_statistics",
    "write_scores",
]
