"""The score table as padded arrays: one row per problem, one column per candidate."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from lark_jax.errors import SelectionError
from lark_jax.scoring.table import OK, CandidateScore, ScoreTable


@dataclass(frozen=True)
class Candidates:
    """Rows of a score table by problem, in order of first appearance; candidates in table order, padded to K."""

    table: ScoreTable
    rows_nk: np.ndarray  # int64 [N, K]: row of the table, -1 for padding; never -1 in column 0

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.rows_nk.shape[0], self.rows_nk.shape[1]

    @functools.cached_property
    def valid(self) -> np.ndarray:
        """bool [N, K]: scored, with target tokens, and with finite loss and Brier score. False for padding."""
        return self._padded(valid_rows(self.table), False)

    def column(self, name: str, metric: str | None = None) -> np.ndarray:
        """A column of the table, float64 [N, K], NaN for padding and where the table has no value.

        Args:
          metric: the entry of `score.metrics` that adds the column; None for a fixed column.

        Raises:
          SelectionError: the table has no such column; the message names the metric to add.
        """
        if name not in self.table.names:
            what = f"metric {metric!r}" if metric else f"the metric with column {name!r}"
            raise SelectionError(
                f"the score table has no column {name!r}; add {what} to config.score.metrics and 'score' to "
                "config.stages (the pool is not scored again)"
            )
        return self._padded(self.table.numbers(name), math.nan)

    def _padded(self, values: np.ndarray, padding: float) -> np.ndarray:
        return np.where(self.rows_nk >= 0, values[self.rows_nk], np.asarray(padding, values.dtype))


def group_by_problem(scores: ScoreTable | Sequence[CandidateScore]) -> Candidates:
    table = ScoreTable.of(scores)
    problems = table.codes("problem_id")
    order = np.argsort(problems, kind="stable")
    counts = np.bincount(problems)
    first = np.cumsum(counts) - counts
    grouped = problems[order]
    rows_nk = np.full((len(counts), counts.max(initial=0)), -1, np.int64)
    rows_nk[grouped, np.arange(len(order)) - first[grouped]] = order
    return Candidates(table, rows_nk)


def valid_rows(table: ScoreTable) -> np.ndarray:
    """Whether each candidate may be selected, bool [rows]."""
    scored = pc.equal(table.table.column("status"), OK).to_numpy()
    finite = np.isfinite(table.numbers("loss")) & np.isfinite(table.numbers("brier"))
    return scored & finite & (table.numbers("num_target_tokens") > 0)
