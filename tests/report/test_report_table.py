"""Tables line up, mark what is missing, and read back from their files."""

import csv
import io
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.config import Experiment, PoolConfig, StudentConfig
from lark_jax.pool.records import SkippedRecord
from lark_jax.report.content import (
    AccuracyResult,
    Count,
    CurvePoint,
    LossCurve,
    ReportContent,
    Setting,
    StageSummary,
    settings_from,
)
from lark_jax.report.table import (
    MISSING,
    Table,
    accuracy_cell,
    accuracy_table,
    csv_table,
    latex_table,
    loss_table,
    markdown_table,
    terminal_report,
    text_table,
)


def result(method: str = "lark", budget: int | None = 3, **changes: object) -> AccuracyResult:
    values: dict = {"benchmark": "held out", "samples": 5, "num_problems": 1200, "num_seeds": 3, "mean": 0.4125}
    return AccuracyResult(method, budget, **{**values, "std": 0.0061, **changes})


def test_text_table_is_aligned() -> None:
    table = Table(("name", "n"), (("a", "1"), ("longer", "1,000")), (False, True))
    assert text_table(table).splitlines() == [
        "name        n",
        "------  -----",
        "a           1",
        "longer  1,000",
    ]


@given(st.lists(st.tuples(st.text(), st.text()), max_size=5))
def test_text_table_has_one_line_per_row(rows: list[tuple[str, str]]) -> None:
    lines = text_table(Table(("x", "y"), tuple(rows), (False, True))).split("\n")
    assert len(lines) == len(rows) + 2
    assert all(line.isprintable() for line in lines)
    if all(cell.isascii() for row in rows for cell in row):
        assert len({len(line) for line in lines}) == 1


def test_wide_characters_count_twice() -> None:
    lines = text_table(Table(("x", "y"), (("模型", "1"), ("abcd", "2")), (False, False))).splitlines()
    assert lines[2:] == ["模型  1", "abcd  2"]


def test_markdown_cells_cannot_break_the_table() -> None:
    text = markdown_table(Table(("a", "b"), (("x|y\n\\|", "2"),), (False, True)))
    assert text.splitlines() == ["| a | b |", "| --- | ---: |", "| x\\|y \\\\\\| | 2 |"]


def test_csv_reads_back_as_the_table() -> None:
    table = Table(("a,b", "n"), (('say "hi"\nthere', "1"), ("≥", "2")), (False, True))
    assert list(csv.reader(io.StringIO(csv_table(table)))) == [list(table.header), *map(list, table.rows)]


def test_latex_escapes_special_characters_and_sets_rules() -> None:
    table = Table(("a_b & c", "J ≥ 1"), (("50% \\ {x}^~$#", "1"), ("Total", "2")), (False, True))
    assert latex_table(table, rule_before_last=True).splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"a\_b \& c & J \ensuremath{\ge} 1 \\",
        r"\midrule",
        r"50\% \textbackslash{} \{x\}\textasciicircum{}\textasciitilde{}\$\# & 1 \\",
        r"\midrule",
        r"Total & 2 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert latex_table(table).count(r"\midrule") == 1


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        Table(("a", "b"), (("1",),), (False, False))


@pytest.mark.parametrize(
    ("changes", "cell"),
    [
        ({}, "41.2 ± 0.6"),
        ({"std": 0.0}, "41.2 ± 0.0"),
        ({"std": None, "num_seeds": 1}, "41.2 (one seed)"),
        ({"std": math.nan, "num_seeds": 1}, "41.2 (one seed)"),
        ({"std": math.nan}, "41.2 (no std)"),
        ({"mean": math.nan}, "not measured"),
        ({"mean": 0.0, "std": 0.0}, "0.0 ± 0.0"),
        ({"mean": 1.0}, "100.0 ± 0.6"),
    ],
)
def test_accuracy_cell_says_what_is_known(changes: dict, cell: str) -> None:
    assert accuracy_cell(result(**changes)) == cell


def test_accuracy_table_has_a_row_per_student_and_marks_gaps() -> None:
    results = [
        result("base", None, mean=0.2),
        result("lark", 1),
        result("lark", 3),
        result("lark", 3, benchmark="other", num_problems=30),
    ]
    table = accuracy_table(results)
    assert table.header == ("method", "B", "held out Acc@5 (n=1,200)", "other Acc@5 (n=30)")
    assert table.rows == (
        ("base", MISSING, "20.0 ± 0.6", MISSING),
        ("lark", "1", "41.2 ± 0.6", MISSING),
        ("lark", "3", "41.2 ± 0.6", "41.2 ± 0.6"),
    )


def test_terminal_report_holds_results_counts_and_skips() -> None:
    skipped = (SkippedRecord("p", "c", "pool.jsonl:3", "empty"),)
    content = ReportContent(
        "title",
        results=(result(interval=(0.3, 0.5)),),
        interval_note="95% bootstrap",
        stages=(StageSummary("score", (Count("trajectories", 2400),), skipped), StageSummary("select")),
    )
    text = terminal_report(content)
    for part in ("title", "41.2 ± 0.6", "30.0 to 50.0", "1,200", "95% bootstrap"):
        assert part in text
    assert "score: 2,400 trajectories, 1 skipped\nselect: 0 skipped" in text


def test_terminal_report_without_evaluation_says_so() -> None:
    assert "no evaluation" in terminal_report(ReportContent("title"))


def test_settings_are_flattened_to_the_names_of_the_command_line() -> None:
    experiment = Experiment(str(Path("runs")), StudentConfig("student"), PoolConfig("pool.jsonl"), stages=("score",))
    settings = {setting.name: setting.value for setting in settings_from(experiment)}
    assert settings["workdir"] == "'runs'"
    assert settings["finetune.learning_rate"] == "1e-05"
    assert settings["select.budgets"] == "(3,)"
    assert settings["synthetic"] == "None"
    assert "finetune" not in settings


def test_settings_of_nested_mappings_keep_empty_ones() -> None:
    assert settings_from({"a": {"b": {"c": 1}, "d": {}}, "e": "x"}) == (
        Setting("a.b.c", "1"),
        Setting("a.d", "{}"),
        Setting("e", "'x'"),
    )


def test_the_loss_table_shows_what_was_seen_and_the_lowest_held_out_loss() -> None:
    training = (CurvePoint(1, 64, 5_000, 1.5), CurvePoint(2, 100, 8_000, 1.25))
    held_out = (CurvePoint(0, 0, 0, 2.0), CurvePoint(1, 64, 5_000, 1.75), CurvePoint(2, 100, 8_000, 1.8))
    table = loss_table([LossCurve("lark", 3, training, held_out), LossCurve("grape", 1, (), ())])
    assert table.header[-3:] == ("held out before", "lowest (step)", "after")
    assert table.rows == (
        ("lark", "3", "2", "100", "8,000", "1.5000", "1.2500", "2.0000", "1.7500 (1)", "1.8000"),
        ("grape", "1", "0", "0", "0", MISSING, MISSING, MISSING, MISSING, MISSING),
    )
    assert len(loss_table([LossCurve("lark", 3, training)]).header) == 7
