"""Accuracy as figure and tables: they carry the numbers and mark what is missing."""

import numpy as np
import pytest
from report_parts import evaluated, texts

from lark_jax.report.accuracy import accuracy_cell, accuracy_detail_table, accuracy_figure, accuracy_table
from lark_jax.report.style import method_styles
from lark_jax.report.table import MISSING


def test_bars_have_the_height_of_the_means_and_base_is_a_line() -> None:
    students = [
        evaluated("base", None, 0.3),
        evaluated("lark", 1, 0.41),
        evaluated("random", 1, 0.35),
        evaluated("lark", 3, 0.5),
    ]
    figure = accuracy_figure(students, method_styles(["lark", "random"]))
    (axes,) = figure.axes
    heights = [patch.get_height() for container in axes.containers for patch in getattr(container, "patches", [])]
    assert sorted(heights) == pytest.approx([35.0, 41.0, 50.0])
    assert any(np.allclose(line.get_ydata(), 30.0) for line in axes.lines)
    assert "base student" in texts(figure)


def test_error_bars_end_at_mean_plus_and_minus_std() -> None:
    figure = accuracy_figure([evaluated("lark", 1, 0.4, std=0.07)], method_styles(["lark"]))
    (bar,) = [container for container in figure.axes[0].containers if hasattr(container, "has_yerr")]
    segment = bar.lines[2][0].get_segments()[0]
    assert sorted(segment[:, 1]) == pytest.approx([33.0, 47.0])


def test_without_std_no_error_bar_is_drawn() -> None:
    figure = accuracy_figure([evaluated("lark", 1, 0.4, std=None)], method_styles(["lark"]))
    assert not [container for container in figure.axes[0].containers if hasattr(container, "has_yerr")]


@pytest.mark.parametrize("means", [[0.0, 0.0], [1.0, 1.0]])
def test_accuracy_extremes_are_drawable(means: list[float]) -> None:
    students = [evaluated("base", None, means[0]), evaluated("lark", 2, means[1])]
    assert "B" in texts(accuracy_figure(students, method_styles(["lark"])))


def test_only_the_base_student_is_drawable() -> None:
    assert "30.0" in texts(accuracy_figure([evaluated("base", None, 0.3)], {}))


def test_one_panel_per_benchmark() -> None:
    names = [f"bench {i}" for i in range(5)]
    figure = accuracy_figure([evaluated("lark", 1, 0.4, 0.01, *names)], method_styles(["lark"]))
    titles = [axes.get_title(loc="left").split("  ")[0] for axes in figure.axes if axes.axison]
    assert titles == names


@pytest.mark.parametrize(
    ("mean", "std", "cell"),
    [
        (0.4125, 0.0061, "41.2 ± 0.6"),
        (0.4125, 0.0, "41.2 ± 0.0"),
        (0.4125, None, "41.2 (one seed)"),
        (0.0, 0.0, "0.0 ± 0.0"),
        (1.0, 0.0061, "100.0 ± 0.6"),
    ],
)
def test_accuracy_cells_have_a_deviation_if_there_are_several_seeds(mean: float, std: float | None, cell: str) -> None:
    assert accuracy_cell(evaluated("lark", 3, mean, std).benchmarks[0].accuracy) == cell


def test_the_accuracy_table_has_a_row_per_student_and_marks_gaps() -> None:
    students = [
        evaluated("base", None, 0.2, 0.006, "held out", num_problems=1200),
        evaluated("lark", 3, 0.4125, 0.006, "held out", "other", num_problems=1200),
    ]
    table = accuracy_table(students)
    assert table.header == ("method", "B", "held out Acc@5 (n=1,200)", "other Acc@5 (n=1,200)")
    assert table.rows == (
        ("base", MISSING, "20.0 ± 0.6", MISSING),
        ("lark", "3", "41.2 ± 0.6", "41.2 ± 0.6"),
    )


def test_the_detail_table_has_a_row_per_benchmark_and_student_with_its_interval() -> None:
    students = [evaluated("base", None, 0.2, None, "a", "b"), evaluated("lark", 3, 0.5, 0.006, "b", "c")]
    assert accuracy_detail_table(students).rows == (
        ("a", "base", MISSING, "Acc@5", "20.0 (one seed)", "10.0 to 30.0", "50", "1"),
        ("b", "base", MISSING, "Acc@5", "20.0 (one seed)", "10.0 to 30.0", "50", "1"),
        ("b", "lark", "3", "Acc@5", "50.0 ± 0.6", "40.0 to 60.0", "50", "3"),
        ("c", "lark", "3", "Acc@5", "50.0 ± 0.6", "40.0 to 60.0", "50", "3"),
    )
