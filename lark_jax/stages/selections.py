"""Compares selections for the report, from their training files and the score table."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from lark_jax.report.content import SelectionComparison, SelectionProfile
from lark_jax.scoring import ScoreTable
from lark_jax.selection import TRAIN_PARQUET
from lark_jax.selection.comparison import Pick, jaccard, teacher_shares


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
