"""Metrics in files of their own, and their join with the statistics."""

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from score_records import random_record

from lark_jax.errors import PipelineError
from lark_jax.scoring import CandidateScore, read_scores, write_scores
from lark_jax.scoring.metric_columns import MetricColumns, join, read_metric, write_metric

CANDIDATES = tuple((f"p{row // 3}", f"c{row % 3}") for row in range(8))
values = st.lists(st.floats(allow_nan=True, allow_infinity=False), min_size=8, max_size=8).map(np.asarray)


def scores(metrics: dict[str, np.ndarray] | None = None) -> list[CandidateScore]:
    rng = np.random.default_rng(1)
    return [
        random_record(rng, *candidate, metrics={name: column[row] for name, column in (metrics or {}).items()})
        for row, candidate in enumerate(CANDIDATES)
    ]


@given(values, values, st.permutations(range(8)), st.permutations(range(8)))
def test_a_joined_table_has_the_rows_that_writing_everything_at_once_gives(
    tmp_path_factory: pytest.TempPathFactory, first: np.ndarray, second: np.ndarray, order: list, another: list
) -> None:
    folder = tmp_path_factory.mktemp("join")
    write_scores(folder / "all.parquet", scores({"zeta": first, "alpha": second, "beta": -first}))
    write_scores(folder / "statistics.parquet", scores())
    for name, columns, rows in (("z", {"zeta": first, "beta": -first}, order), ("a", {"alpha": second}, another)):
        shuffled = {column: content[rows] for column, content in columns.items()}
        write_metric(folder / f"{name}.parquet", MetricColumns(tuple(CANDIDATES[row] for row in rows), shuffled))
    join(folder / "statistics.parquet", [folder / "z.parquet", folder / "a.parquet"], folder / "joined.parquet")
    assert pq.read_table(folder / "joined.parquet").equals(pq.read_table(folder / "all.parquet"))
    assert pq.read_schema(folder / "joined.parquet").names[-3:] == ["alpha", "beta", "zeta"]


def test_what_could_not_be_computed_is_a_null_in_the_file_and_nan_in_python(tmp_path: Path) -> None:
    column = np.array([1.5, math.nan, -0.0, math.nan, 2.0, 3.0, 4.0, 5.0])
    write_metric(tmp_path / "metric.parquet", MetricColumns(CANDIDATES, {"quality": column}))
    assert pq.read_table(tmp_path / "metric.parquet").column("quality").null_count == 2
    back = read_metric(tmp_path / "metric.parquet")
    assert back.candidates == CANDIDATES
    np.testing.assert_array_equal(back.values["quality"], column)
    assert back.missing() == (CANDIDATES[1], CANDIDATES[3])
    write_scores(tmp_path / "statistics.parquet", scores())
    join(tmp_path / "statistics.parquet", [tmp_path / "metric.parquet"], tmp_path / "joined.parquet")
    joined = [score.metrics["quality"] for score in read_scores(tmp_path / "joined.parquet")]
    np.testing.assert_array_equal(joined, column)


@pytest.mark.parametrize(
    ("candidates", "columns", "message"),
    [
        (CANDIDATES, {"loss": np.ones(8)}, "'loss' has the name of a fixed column"),
        (CANDIDATES, {"quality": np.ones(8, np.float32)}, "float32"),
        (CANDIDATES, {"quality": np.ones(7)}, r"\(7,\)"),
        (CANDIDATES, {"quality": np.full(8, math.inf)}, "infinite"),
        (CANDIDATES[:7] + CANDIDATES[:1], {"quality": np.ones(8)}, "named twice"),
    ],
)
def test_columns_that_break_the_format_are_a_bug_where_they_are_made(
    candidates: tuple, columns: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MetricColumns(candidates, columns)


def test_a_join_refuses_metrics_of_another_pool_and_two_columns_of_one_name(tmp_path: Path) -> None:
    write_scores(tmp_path / "statistics.parquet", scores())
    write_metric(tmp_path / "short.parquet", MetricColumns(CANDIDATES[:-1], {"quality": np.ones(7)}))
    with pytest.raises(PipelineError, match=r"short\.parquet: no row for candidate p2/c1"):
        join(tmp_path / "statistics.parquet", [tmp_path / "short.parquet"], tmp_path / "joined.parquet")
    write_metric(tmp_path / "whole.parquet", MetricColumns(CANDIDATES, {"quality": np.ones(8)}))
    with pytest.raises(PipelineError, match=r"column 'quality' is in the score table already"):
        join(tmp_path / "statistics.parquet", [tmp_path / "whole.parquet"] * 2, tmp_path / "joined.parquet")
    assert not (tmp_path / "joined.parquet").exists()


@pytest.mark.parametrize("content", [b"not parquet", b""])
def test_a_file_that_is_no_metric_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "columns.parquet").write_bytes(content)
    with pytest.raises(PipelineError, match=r"columns\.parquet: not the columns of a metric") as caught:
        read_metric(tmp_path / "columns.parquet")
    assert "\n" not in str(caught.value)
