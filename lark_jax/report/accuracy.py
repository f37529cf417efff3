"""Accuracy of the students of one experiment: tables and figure. Accuracies are shown in percent."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lark_jax.evaluation.accuracy import CONFIDENCE, RESAMPLES, Accuracy, BenchmarkResult
from lark_jax.report.style import INK, MUTED, MethodStyle, Plate, drawing_style, new_figure, quiet_axes, short
from lark_jax.report.table import MISSING, Table, budget_cell, student_label

INTERVAL = f"{CONFIDENCE:.0%} percentile bootstrap over problems, {RESAMPLES:,} resamples"
_PANELS_PER_ROW = 2
_BAR_SLOT = 0.8  # share of the distance between two budgets that bars fill


@dataclass(frozen=True)
class EvaluatedStudent:
    """One model, fine-tuned on one selection (or not), on all benchmarks of its run."""

    model: str
    method: str  # "base" before fine-tuning
    budget: int | None  # None before fine-tuning
    benchmarks: tuple[BenchmarkResult, ...]

    @property
    def label(self) -> str:
        return student_label(self.method, self.budget)


def benchmark_names(students: Sequence[EvaluatedStudent]) -> tuple[str, ...]:
    """In order of first appearance."""
    return tuple(dict.fromkeys(result.benchmark for student in students for result in student.benchmarks))


def accuracy_table(students: Sequence[EvaluatedStudent]) -> Table:
    """One row per student, one column per benchmark: mean ± standard deviation."""
    names = benchmark_names(students)
    header = ["method", "B"]
    for name in names:
        _, result = results_on(name, students)[0]
        header.append(f"{name} Acc@{result.samples} (n={result.num_problems:,})")
    rows = []
    for student in students:
        cells = {result.benchmark: accuracy_cell(result.accuracy) for result in student.benchmarks}
        rows.append((student.method, budget_cell(student.budget), *(cells.get(name, MISSING) for name in names)))
    return Table(tuple(header), tuple(rows), (False, True) + (True,) * len(names))


def accuracy_detail_table(students: Sequence[EvaluatedStudent]) -> Table:
    """One row per student and benchmark, with interval, problems and seeds."""
    header = ("benchmark", "method", "B", "metric", "mean ± std (%)", "interval (%)", "problems", "seeds")
    rows = tuple(
        (
            name,
            student.method,
            budget_cell(student.budget),
            f"Acc@{result.samples}",
            accuracy_cell(result.accuracy),
            f"{100 * result.accuracy.low:.1f} to {100 * result.accuracy.high:.1f}",
            f"{result.num_problems:,}",
            str(len(result.seeds)),
        )
        for name in benchmark_names(students)
        for student, result in results_on(name, students)
    )
    return Table(header, rows, (False, False, True, False, True, True, True, True))


def accuracy_cell(accuracy: Accuracy) -> str:
    """`41.3 ± 0.6` in percent; one seed has no standard deviation."""
    mean = f"{100 * accuracy.mean:.1f}"
    return f"{mean} (one seed)" if accuracy.std is None else f"{mean} ± {100 * accuracy.std:.1f}"


def results_on(benchmark: str, students: Sequence[EvaluatedStudent]) -> list[tuple[EvaluatedStudent, BenchmarkResult]]:
    """The students that were evaluated on `benchmark`, with their results."""
    pairs = ((student, result) for student in students for result in student.benchmarks)
    return [(student, result) for student, result in pairs if result.benchmark == benchmark]


def accuracy_plate(students: Sequence[EvaluatedStudent], styles: Mapping[str, MethodStyle]) -> Plate:
    caption = (
        "Mean accuracy over decoding seeds by selection method and budget B (trajectories per problem). Dashed line: "
        "the student before fine-tuning. Thick bars with caps: ± one standard deviation over seeds. Thin lines: "
        f"{INTERVAL}."
    )
    return Plate(accuracy_figure(students, styles), "Accuracy by method and budget", caption)


def accuracy_figure(students: Sequence[EvaluatedStudent], styles: Mapping[str, MethodStyle]) -> Figure:
    """One panel per benchmark: bars by budget and method, the base student as a line (error bars: `_draw_error`)."""
    names = benchmark_names(students)
    columns = min(len(names), _PANELS_PER_ROW)
    rows = math.ceil(len(names) / columns)
    panel_width = max(3.2, 0.5 * len(students) + 1.2)
    with drawing_style():
        figure = new_figure(max(6.5, panel_width * columns), 3.4 * rows + 0.4)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, name in zip(grid.flat, names, strict=False):
            _draw_panel(axes, results_on(name, students), styles)
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        _shared_legend(figure, grid)
    return figure


def _draw_panel(
    axes: Axes, results: Sequence[tuple[EvaluatedStudent, BenchmarkResult]], styles: Mapping[str, MethodStyle]
) -> None:
    budgets = sorted({student.budget for student, _ in results if student.budget is not None})
    tuned = {student.method for student, _ in results if student.budget is not None}
    methods = [method for method in styles if method in tuned]
    width = _BAR_SLOT / max(1, len(methods))
    for student, result in results:
        if student.budget is None:
            _draw_base(axes, student.label, result.accuracy)
            continue
        offset = (methods.index(student.method) - (len(methods) - 1) / 2) * width
        position = budgets.index(student.budget) + offset
        _draw_bar(axes, position, 0.88 * width, student.method, result.accuracy, styles[student.method])
    axes.set_xticks(range(len(budgets)), [f"B={budget}" for budget in budgets])
    axes.set_xlim(-0.6, max(0, len(budgets) - 1) + 0.6)
    tops = [max(result.accuracy.mean + (result.accuracy.std or 0.0), result.accuracy.high) for _, result in results]
    axes.set_ylim(0, 118 * max(tops) or 1.0)
    benchmark = results[0][1]
    axes.set_title(f"{short(benchmark.benchmark)}  (n={benchmark.num_problems:,})", loc="left", color=INK)
    axes.set_ylabel(f"Acc@{benchmark.samples} (%)")
    quiet_axes(axes, "y")


def _draw_base(axes: Axes, label: str, accuracy: Accuracy) -> None:
    mean = 100 * accuracy.mean
    if accuracy.std is not None:
        low, high = mean - 100 * accuracy.std, mean + 100 * accuracy.std
        axes.axhspan(low, high, color=MUTED, alpha=0.18, linewidth=0, zorder=0)
    axes.axhline(mean, color=INK, linewidth=1.2, linestyle="--", zorder=3, label=f"{short(label)} student")
    axes.annotate(
        f"{mean:.1f}",
        (1, mean),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
    )


def _draw_bar(axes: Axes, position: float, width: float, method: str, accuracy: Accuracy, style: MethodStyle) -> None:
    mean = 100 * accuracy.mean
    axes.bar(
        position,
        mean,
        width,
        color=style.colour,
        hatch=style.hatch,
        edgecolor="white" if style.hatch else style.colour,
        linewidth=0,
        label=short(method),
    )
    top = _draw_error(axes, position, accuracy)
    axes.annotate(f"{mean:.1f}", (position, top), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9)


def _draw_error(axes: Axes, position: float, accuracy: Accuracy) -> float:
    """Thick with caps: ± one standard deviation over seeds. Thin: the confidence interval. Returns the upper end."""
    mean, low, high = 100 * accuracy.mean, 100 * accuracy.low, 100 * accuracy.high
    axes.plot((position, position), (low, high), color=INK, linewidth=0.9)
    if accuracy.std is None:
        return max(mean, high)
    spread = 100 * accuracy.std
    axes.errorbar(position, mean, spread, color=INK, linewidth=2.0, capsize=3, capthick=1.2)
    return max(high, mean + spread)


def _shared_legend(figure: Figure, grid: np.ndarray) -> None:
    """One legend above all panels, with every label once."""
    entries: dict[str, Artist] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(list(entries.values()), list(entries), loc="outside upper left", ncols=min(5, len(entries)))
