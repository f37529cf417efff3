"""Tables line up, mark what is missing, and read back from their files."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_parts import evaluated

from lark_jax.config import Experiment, PoolConfig, StudentConfig
from lark_jax.pool.records import SkippedRecord
from lark_jax.report.content import ReportContent, StageSummary, leaves, terminal_report
from lark_jax.report.table import Table, csv_table, latex_table, markdown_table, text_table


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


def test_terminal_report_holds_results_counts_and_skips() -> None:
    skipped = (SkippedRecord("p", "c", "pool.jsonl:3", "empty"),)
    content = ReportContent(
        "title",
        students=(evaluated("lark", 3, 0.4125, 0.0061, num_problems=1200),),
        stages=(StageSummary("score", {"trajectories": 2400, "duplicates": 0}, skipped), StageSummary("select")),
    )
    text = terminal_report(content)
    for part in ("title", "41.2 ± 0.6", "31.2 to 51.2", "1,200", "95% percentile bootstrap"):
        assert part in text
    assert "score: 2,400 trajectories, 1 skipped\nselect: 0 skipped" in text


def test_terminal_report_without_evaluation_says_so() -> None:
    assert "no evaluation" in terminal_report(ReportContent("title"))


def test_fields_are_flattened_to_the_names_of_the_command_line() -> None:
    experiment = Experiment(str(Path("runs")), StudentConfig("student"), PoolConfig("pool.jsonl"), stages=("score",))
    fields = dict(leaves(experiment))
    assert fields["workdir"] == "runs"
    assert fields["finetune.learning_rate"] == 1e-05
    assert fields["select.budgets"] == (3,)
    assert fields["synthetic"] is None
    assert "finetune" not in fields


def test_nested_mappings_are_flattened_and_keep_empty_ones() -> None:
    nested = {"a": {"b": {"c": 1}, "d": {}}, "e": "x"}
    assert list(leaves(nested)) == [("a.b.c", 1), ("a.d", {}), ("e", "x")]
