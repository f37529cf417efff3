"""The table of graded samples has everything that is counted."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.accuracy import accuracies
from lark_jax.evaluation.benchmark_records import Benchmark, BenchmarkProblem
from lark_jax.evaluation.samples import SAMPLE_TABLE, SCHEMA, GradedSample, read_correctness, write_sample_table

SEEDS, SAMPLES = (7, 3), 4


def benchmark(name, count):
    problems = [BenchmarkProblem(f"{name}/{i}", "?", str(i), "number", str(i % 3) if i else None) for i in range(count)]
    return Benchmark(name, tuple(problems), "fingerprint")


def rows_of(bench, correct_spn):
    return [
        GradedSample(
            problem.problem_id, seed, sample, "text", "\ud800" if sample == 1 else None,
            bool(correct_spn[s, p, sample]), "wrong", "length" if sample == 2 else "stop", 10 + sample,
        )
        for s, seed in enumerate(SEEDS)
        for p, problem in enumerate(bench.problems)
        for sample in range(SAMPLES)
    ]  # fmt: skip


@pytest.fixture
def written(tmp_path):
    rng = np.random.default_rng()
    benches = [benchmark("many", 5), benchmark("one", 1)]
    tables = [rng.random((len(SEEDS), len(bench.problems), SAMPLES)) < 0.5 for bench in benches]
    rows = [rows_of(*pair) for pair in zip(benches, tables, strict=True)]
    write_sample_table(tmp_path, list(zip(benches, rows, strict=True)))
    return tmp_path, benches, tables


def test_every_sample_has_a_row_and_is_read_back(written):
    folder, benches, tables = written
    table = pq.read_table(folder / SAMPLE_TABLE)
    assert table.schema.equals(SCHEMA)
    assert table.num_rows == len(SEEDS) * SAMPLES * 6
    first = table.slice(2, 1).to_pylist()[0]
    expected = {"benchmark": "many", "problem_id": "many/0", "level": None, "seed": 7, "sample": 2, "num_tokens": 12}
    assert {name: first[name] for name in expected} == expected
    assert table["truncated"].to_pylist() == [False, False, True, False] * 12
    assert set(table["extracted"].to_pylist()) == {None, "?"}
    correctness = read_correctness(folder)
    for bench, correct_spn in zip(benches, tables, strict=True):
        ids, found = correctness[bench.name]
        assert ids == tuple(problem.problem_id for problem in bench.problems)
        np.testing.assert_array_equal(found, correct_spn)
        assert accuracies(found) == accuracies(correct_spn)


def test_a_table_with_a_missing_row_is_refused(written):
    folder, _, _ = written
    table = pq.read_table(folder / SAMPLE_TABLE)
    pq.write_table(table.slice(1), folder / SAMPLE_TABLE)
    with pytest.raises(EvaluationError, match="many: 39 samples of 5 problems and 2 seeds"):
        read_correctness(folder)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(EvaluationError, match=r"samples\.parquet: no such file"):
        read_correctness(tmp_path)
