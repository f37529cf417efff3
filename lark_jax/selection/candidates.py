"""The score table as padded arrays: one row per problem, one column per candidate."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lark_jax.errors import SelectionError
from lark_jax.scoring.table import OK, STATISTICS, CandidateScore


@dataclass(frozen=True)
class Candidates:
    """Rows of a score table by problem, in order of first appearance; candidates in table order, padded to K."""

    problems: tuple[tuple[CandidateScore, ...], ...]  # N problems, 1 to K candidates each

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return len(self.problems), max((len(problem) for problem in self.problems), default=0)

    @functools.cached_property
    def valid(self) -> np.ndarray:
        """bool [N, K]: scored, with target tokens, and with finite loss and Brier score. False for padding."""
        valid = np.zeros(self.shape, bool)
        for row, problem in enumerate(self.problems):
            valid[row, : len(problem)] = [is_valid(score) for score in problem]
        return valid

    def column(self, name: str) -> np.ndarray:
        """A statistic or a further metric of the score table, float64 [N, K], NaN for padding.

        Raises:
          SelectionError: a candidate of the table has no such metric.
        """
        values = np.full(self.shape, math.nan)
        for row, problem in enumerate(self.problems):
            values[row, : len(problem)] = [_value(score, name) for score in problem]
        return values


def group_by_problem(scores: Sequence[CandidateScore]) -> Candidates:
    groups: dict[str, list[CandidateScore]] = {}
    for score in scores:
        groups.setdefault(score.problem_id, []).append(score)
    return Candidates(tuple(tuple(group) for group in groups.values()))


def is_valid(score: CandidateScore) -> bool:
    """Whether a candidate may be selected at all."""
    finite = math.isfinite(score.loss) and math.isfinite(score.brier)
    return score.status == OK and score.num_target_tokens > 0 and finite


def _value(score: CandidateScore, name: str) -> float:
    if name in STATISTICS:
        return float(getattr(score, name))
    if name not in score.metrics:
        raise SelectionError(
            f"candidate {score.name}: the score table has no metric {name!r}; add it to score.metrics and score again"
        )
    return score.metrics[name]
