"""Rows of a score table for tests, without listing the statistics."""

import dataclasses
from typing import Any

import numpy as np

from lark_jax.scoring.statistics import STATISTICS
from lark_jax.scoring.table import CandidateScore

STATISTIC_NAMES = tuple(statistic.name for statistic in STATISTICS)


def score_record(problem_id: str = "p0", candidate_id: str = "c0", **values: Any) -> CandidateScore:
    """A scored candidate; `values` are fields of the row or statistics by name, the other statistics are 0.5."""
    record = CandidateScore(problem_id, candidate_id, "teacher", 5, 9, False, dict.fromkeys(STATISTIC_NAMES, 0.5))
    return changed(record, **values)


def random_record(rng: np.random.Generator, problem_id: str, candidate_id: str, **values: Any) -> CandidateScore:
    """A scored candidate whose statistics are drawn from [0.1, 0.9]."""
    drawn = dict(zip(STATISTIC_NAMES, rng.uniform(0.1, 0.9, len(STATISTIC_NAMES)).tolist(), strict=True))
    return score_record(problem_id, candidate_id, **drawn | values)


def changed(record: CandidateScore, **values: Any) -> CandidateScore:
    """A copy with other values; like `dataclasses.replace`, and statistics may be given by name."""
    statistics = {name: values.pop(name, value) for name, value in record.statistics.items()}
    return dataclasses.replace(record, statistics=statistics, **values)
