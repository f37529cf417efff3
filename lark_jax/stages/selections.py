"""Compares selections for the report, from their training files and the score table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from lark_jax.report.content import SelectionComparison, SelectionProfile
from lark_jax.scoring import ScoreTable
from lark_jax.selection import TRAIN_PARQUET


@dataclass(frozen=True)
class Pick:
    """A trajectory of a training set."""

    problem_id: str
    candidate_id: str
    teacher: str
    weight: float  # > 0; sums to 1 over the picks of a problem

    @property
    def key(self) -> tuple[str, str]:
        return self.problem_id, self.candidate_id


def read_picks(directory: Path) -> tuple[Pick, ...]:
    """Reads the trajectories of a finished selection, without their texts."""
    rows = pq.read_table(directory / TRAIN_PARQUET, columns=["weight", "meta"]).to_pylist()
    return tuple(
        Pick(row["meta"]["problem_id"], row["meta"]["candidate_id"], row["meta"]["teacher"], row["weight"])
        for row in rows
    )


def comparison_of(
    table: ScoreTable, selections: Sequence[tuple[str, int, Sequence[Pick]]]
) -> SelectionComparison | None:
    """Compares selections (method, budget, picks) from `table`; None for fewer than two."""
    if len(selections) < 2:
        return None
    rows = range(len(table))
    ids = zip(*(table.texts(name, rows) for name in ("problem_id", "candidate_id")), strict=True)
    tokens = dict(zip(ids, table.numbers("num_target_tokens").tolist(), strict=True))
    profiles = tuple(
        SelectionProfile(
            method=method,
            budget=budget,
            trajectories=len(picks),
            mean_tokens=sum(tokens[pick.key] for pick in picks) / len(picks),
            teachers=tuple(teacher_shares(picks).items()),
        )
        for method, budget, picks in selections
    )
    overlap = jaccard([picks for _, _, picks in selections])
    return SelectionComparison(profiles, tuple(map(tuple, overlap.tolist())))


def jaccard(selections: Sequence[Sequence[Pick]]) -> np.ndarray:
    """|A and B| / |A or B| of the trajectories of each pair of selections, float64 [S, S]; 1 for two empty ones."""
    sets = [{pick.key for pick in picks} for picks in selections]
    overlap = np.ones((len(sets), len(sets)))
    for row, own in enumerate(sets):
        for column, other in enumerate(sets[:row]):
            either = len(own | other)
            overlap[row, column] = overlap[column, row] = len(own & other) / either if either else 1.0
    return overlap


def teacher_shares(picks: Iterable[Pick]) -> dict[str, float]:
    """Share of the training weight per teacher, teachers in alphabetical order."""
    weights: dict[str, float] = {}
    for pick in picks:
        weights[pick.teacher] = weights.get(pick.teacher, 0.0) + pick.weight
    total = sum(weights.values())
    return {teacher: weights[teacher] / total for teacher in sorted(weights)}
