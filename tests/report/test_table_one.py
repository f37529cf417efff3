"""Table 1 has the paper's layout and numbers, and refuses results that are not comparable."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.accuracy import BenchmarkResult, accuracies, level_accuracies, paired_difference
from lark_jax.report.accuracy import EvaluatedStudent
from lark_jax.report.table import MISSING, csv_table
from lark_jax.report.table_one import PairedDifference, accuracy_list, difference_table, table_one, table_one_latex

SAMPLES = 2


def benchmark(name, num_problems, solved_per_seed, levels=None):
    """Only the first sample of every solved problem is correct."""
    correct = np.zeros((len(solved_per_seed), num_problems, SAMPLES), dtype=bool)
    for seed, solved in enumerate(solved_per_seed):
        correct[seed, :solved, 0] = True
    return BenchmarkResult(
        benchmark=name, fingerprint=name, num_problems=num_problems, samples=SAMPLES,
        seeds=tuple(range(len(solved_per_seed))), by_k=accuracies(correct),
        levels=() if levels is None else level_accuracies(correct, levels),
        num_unboxed=0, num_cut=0, mean_tokens=1.0, ungraded=(),
    )  # fmt: skip


def student(model, method, budget, aime, amc=None):
    results = [benchmark("aime24", 30, aime)] + ([] if amc is None else [benchmark("amc83", 83, amc)])
    return EvaluatedStudent(model, method, budget, tuple(results))


STUDENTS = (
    student("7B", "base", None, (5, 6, 6), (40, 39, 40)),
    student("7B", "random", 1, (6, 5, 8)),
    student("7B", "lark", 1, (8, 9, 10), (54, 55, 55)),
    student("7B", "lark", 3, (10, 11, 12), (62, 63, 65)),
    student("1B", "base", None, (0, 0, 0), (20, 21, 20)),
)


def test_rows_are_models_and_methods_and_columns_budgets_and_benchmarks():
    table = table_one(STUDENTS)
    assert table.header == (
        "Model", "Method", "B=1 aime24", "B=1 amc83", "B=1 Avg", "B=3 aime24", "B=3 amc83", "B=3 Avg",
    )  # fmt: skip
    assert [row[:2] for row in table.rows] == [("7B", "base"), ("7B", "random"), ("7B", "lark"), ("1B", "base")]
    base, random, lark, small = (row[2:] for row in table.rows)
    assert base[0] == "18.89±1.92"  # the paper's BaseModel on AIME-2024
    assert base[:3] == base[3:]
    assert random == ("21.11±5.09", MISSING, MISSING, MISSING, MISSING, MISSING)
    assert lark[0] == "30.00±3.33"  # the paper's LARK
    assert small[0] == "0.00±0.00"


def test_the_average_is_that_of_the_benchmarks_and_its_deviation_that_of_the_seeds():
    averages = [(a / 30 + b / 83) / 2 for a, b in zip((8, 9, 10), (54, 55, 55), strict=True)]
    cell = table_one(STUDENTS).rows[2][4]
    assert cell == f"{100 * np.mean(averages):.2f}±{100 * np.std(averages, ddof=1):.2f}"


def test_one_seed_has_no_deviation():
    only = table_one([student("7B", "lark", 3, (9,), (50,))])
    assert only.rows[0][2:] == ("30.00", "60.24", "45.12")
    mixed = table_one([student("7B", "lark", 3, (9,), (50, 50))])
    assert mixed.rows[0][2:] == ("30.00", "60.24±0.00", "45.12")


def test_without_budgets_there_is_one_group():
    assert table_one([STUDENTS[0]]).header == ("Model", "Method", "aime24", "amc83", "Avg")


def test_latex_has_budgets_over_benchmarks_and_as_many_cells_in_every_row():
    lines = table_one_latex([*STUDENTS, student("9_B", "rule_quality", 3, (1, 1, 1))]).splitlines()
    assert lines[0] == r"\begin{tabular}{llrrrrrr}"
    assert lines[2] == r" & & \multicolumn{3}{c}{Budget $B = 1$} & \multicolumn{3}{c}{Budget $B = 3$} \\"
    assert lines[3] == r"\cmidrule(lr){3-5}\cmidrule(lr){6-8}"
    assert lines[4] == r"Model & Method & aime24 & amc83 & Avg & aime24 & amc83 & Avg \\"
    body = lines[6:-2]
    assert len(body) == 5
    assert {line.count("&") for line in body} == {7}
    assert body[0].startswith(r"7B & base & 18.89\ensuremath{\pm}1.92 & ")
    assert body[1].startswith(" & random & ")
    assert body[4].startswith(r"9\_B & rule\_quality & ")
    assert lines[-1] == r"\end{tabular}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "other"}, "aime24: 7B, base and 1B, lark B=1 answered different problems under this name"),
        ({"samples": 5}, "aime24: 7B, base and 1B, lark B=1 are not comparable: Acc@2 and Acc@5"),
    ],
)
def test_incomparable_results_are_refused(change, message):
    other = EvaluatedStudent("1B", "lark", 1, (replace(STUDENTS[0].benchmarks[0], **change),))
    with pytest.raises(EvaluationError, match=message):
        table_one([STUDENTS[0], other])


def test_the_list_has_every_k_and_level_in_full_precision():
    levels = ["easy"] * 10 + ["hard"] * 20
    result = benchmark("aime24", 30, (5, 6, 6), levels)
    text = csv_table(accuracy_list([EvaluatedStudent("7B", "lark", 3, (result,)), STUDENTS[0]]))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 3 * SAMPLES + 2 * SAMPLES
    found = {(row["method"], row["benchmark"], row["level"], row["k"]): row for row in rows}
    whole = found["lark", "aime24", "all", "2"]
    assert float(whole["mean"]) == pytest.approx(17 / 90, abs=1e-6)
    assert float(whole["std"]) == pytest.approx(np.std([5 / 30, 6 / 30, 6 / 30], ddof=1), abs=1e-6)
    assert float(whole["low"]) <= float(whole["mean"]) <= float(whole["high"])
    assert (whole["budget"], whole["problems"], whole["seeds"]) == ("3", "30", "3")
    assert float(found["lark", "aime24", "all", "1"]["mean"]) == pytest.approx(17 / 180, abs=1e-6)
    assert found["lark", "aime24", "easy", "2"]["problems"] == "10"
    assert float(found["lark", "aime24", "easy", "2"]["mean"]) == pytest.approx(17 / 30, abs=1e-6)
    assert float(found["lark", "aime24", "hard", "2"]["mean"]) == 0.0
    assert found["base", "amc83", "all", "1"]["budget"] == ""


def test_differences_carry_their_sign():
    one, other = np.ones((1, 4, 1), dtype=bool), np.zeros((1, 4, 1), dtype=bool)
    rows = [
        PairedDifference("7B", "lark B=1", "random B=1", "amc83", 4, paired_difference(*pair, 1))
        for pair in ((one, other), (other, one))
    ]
    first, second = difference_table(rows).rows
    assert first[4:] == ("Acc@1", "+100.0", "+100.0 to +100.0", "4", "0", "4")
    assert second[5:] == ("-100.0", "-100.0 to -100.0", "0", "4", "4")
