"""Overlap of selections from one score table, and the teachers of their trajectories."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


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
