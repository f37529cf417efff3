"""One forward pass per trajectory under the student: the op, the scorer, the score table."""

from lark_jax.ops.token_statistics import TokenStatistics, token_statistics
from lark_jax.scoring.scorer import assemble_scores, score_pool, score_share
from lark_jax.scoring.table import CandidateScore, ScoreTable, read_score_table, read_scores, write_scores
from lark_jax.scoring.throughput import Throughput
from lark_jax.scoring.workload import ScoreOptions, Workload, plan_workload

__all__ = [
    "CandidateScore",
    "ScoreOptions",
    "ScoreTable",
    "Throughput",
    "TokenStatistics",
    "Workload",
    "assemble_scores",
    "plan_workload",
    "read_score_table",
    "read_scores",
    "score_pool",
    "score_share",
    "token_statistics",
    "write_scores",
]
