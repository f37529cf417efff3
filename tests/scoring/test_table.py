import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from score_records import STATISTIC_NAMES, score_record

from lark_jax.errors import SelectionError
from lark_jax.scoring.table import SCHEMA, SKIPPED, CandidateScore, ScoreTable, read_scores, skipped_score, write_scores


def _same(left: CandidateScore, right: CandidateScore) -> bool:
    """Equal in every field, NaN equal to NaN."""
    return all(
        repr(sorted(a.items()) if isinstance(a, dict) else a) == repr(sorted(b.items()) if isinstance(b, dict) else b)
        for a, b in zip(vars(left).values(), vars(right).values(), strict=True)
    )


statistic = st.floats(allow_nan=True, allow_infinity=True)
candidate_scores = st.builds(
    CandidateScore,
    problem_id=st.text(),
    candidate_id=st.text(),
    teacher=st.text(),
    num_prompt_tokens=st.integers(0, 2**31 - 1),
    num_target_tokens=st.integers(0, 2**31 - 1),
    truncated=st.booleans(),
    statistics=st.fixed_dictionaries(dict.fromkeys(STATISTIC_NAMES, statistic)),
    status=st.sampled_from(["ok", "skipped"]),
    reason=st.text(),
    metrics=st.fixed_dictionaries({"naturalness": statistic, "judge": statistic}),
)


@given(st.lists(candidate_scores, max_size=6, unique_by=lambda score: (score.problem_id, score.candidate_id)))
def test_scores_read_back_exactly_as_they_were_written(tmp_path_factory, scores):
    path = tmp_path_factory.mktemp("table") / "scores.parquet"
    write_scores(path, scores)
    read_back = read_scores(path)
    assert len(read_back) == len(scores)
    assert all(_same(left, right) for left, right in zip(scores, read_back, strict=True))


def test_equal_scores_are_equal_bytes(tmp_path):
    scores = [score_record(metrics={"b": 1.0, "a": 2.0}), skipped_score("p0", "c1", "teacher", "no target tokens")]
    write_scores(tmp_path / "first.parquet", scores)
    scores[0] = score_record(metrics={"a": 2.0, "b": 1.0})
    write_scores(tmp_path / "second.parquet", scores)
    assert (tmp_path / "first.parquet").read_bytes() == (tmp_path / "second.parquet").read_bytes()


def test_columns_are_those_of_the_contract_and_metrics_come_last(tmp_path):
    write_scores(tmp_path / "scores.parquet", [score_record(metrics={"zeta": 1.0, "alpha": 2.0})])
    assert pq.read_schema(tmp_path / "scores.parquet").names == [
        "problem_id",
        "candidate_id",
        "teacher",
        "num_prompt_tokens",
        "num_target_tokens",
        "truncated",
        "loss",
        "brier",
        "mean_clipped_rank",
        "mean_rank",
        "target_prob",
        "wrong_concentration",
        "status",
        "reason",
        "alpha",
        "zeta",
    ]


def test_statistics_of_a_skipped_candidate_are_null_in_the_file_and_nan_in_python(tmp_path):
    write_scores(tmp_path / "scores.parquet", [skipped_score("p0", "c0", "teacher", "prompt too long")])
    assert pq.read_table(tmp_path / "scores.parquet").column("loss").to_pylist() == [None]
    (score,) = read_scores(tmp_path / "scores.parquet")
    assert math.isnan(score.statistics["loss"])
    assert (score.status, score.reason) == (SKIPPED, "prompt too long")


def test_a_metric_may_not_take_the_name_of_a_fixed_column(tmp_path):
    with pytest.raises(ValueError, match="'loss'"):
        write_scores(tmp_path / "scores.parquet", [score_record(metrics={"loss": 1.0})])


def _table(**columns: pa.Array) -> pa.Table:
    """A valid table of one row with some columns replaced."""
    values = dict(zip(SCHEMA.names, ScoreTable.of([score_record()]).table.columns, strict=True))
    return pa.table(values | columns)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (_table().drop_columns(["brier"]), "column 'brier' is missing"),
        (_table(loss=pa.array(["0.5"])), "column 'loss' is string, expected double"),
        (_table(problem_id=pa.array([7])), "column 'problem_id' is int64, expected string"),
        (_table(teacher=pa.array([None], pa.string())), r"column 'teacher' has 1 null\(s\)"),
        (_table(comment=pa.array(["good"])), "column 'comment' is string, expected a floating-point metric"),
        (_table(status=pa.array(["done"])), r"row 0 \(p0/c0\): column 'status' is 'done'"),
        (pa.concat_tables([_table(), _table()]), r"row 1 \(p0/c0\): the candidate has two rows"),
    ],
)
def test_a_broken_table_is_refused_in_one_line_that_names_file_and_column(tmp_path, table, expected):
    path = tmp_path / "scores.parquet"
    pq.write_table(table, path)
    with pytest.raises(SelectionError, match=expected) as caught:
        read_scores(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_file_that_is_not_parquet_are_refused_by_name(tmp_path):
    with pytest.raises(SelectionError, match=r"absent\.parquet: no such score table"):
        read_scores(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("not parquet at all")
    with pytest.raises(SelectionError, match=r"text\.parquet: not a readable parquet file") as caught:
        read_scores(tmp_path / "text.parquet")
    assert "\n" not in str(caught.value)


def test_codes_number_texts_by_first_appearance_also_over_chunks():
    names = ["b", "a", "b", "c", "a", "d", "b"]
    rows = [score_record(name, f"c{row}") for row, name in enumerate(names)]
    whole = ScoreTable.of(rows).table
    expected = [list(dict.fromkeys(names)).index(name) for name in names]
    for pieces in ([whole], [whole.slice(0, 2), whole.slice(2, 3), whole.slice(5)]):
        assert ScoreTable(pa.concat_tables(pieces)).codes("problem_id").tolist() == expected
    assert ScoreTable.of([]).codes("problem_id").tolist() == []


def test_columns_hold_what_the_rows_hold():
    rows = [score_record(metrics={"judge": 0.25}), skipped_score("p0", "c1", "teacher", "too long")]
    table = ScoreTable.of(rows)
    np.testing.assert_array_equal(table.numbers("judge"), [0.25, np.nan])
    np.testing.assert_array_equal(table.numbers("loss"), [rows[0].statistics["loss"], np.nan])
    assert table.numbers("num_target_tokens").tolist() == [rows[0].num_target_tokens, 0]
    assert table.texts("candidate_id", [1, 0]) == ["c1", "c0"]
    assert _same(table.rows()[0], rows[0])
    assert table.only("p0").rows()[1].reason == "too long"
    assert len(table.only("absent")) == 0
