"""Tables as plain data, and as aligned text, markdown, CSV or LaTeX."""

import csv
import io
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from lark_jax.report.content import (
    AccuracyResult,
    CurvePoint,
    LossCurve,
    ReportContent,
    SelectionComparison,
    StageSummary,
)

MISSING = "–"
_LATEX = str.maketrans(
    {
        **{mark: f"\\{mark}" for mark in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\ensuremath{<}",
        ">": r"\ensuremath{>}",
        "≥": r"\ensuremath{\ge}",
        "±": r"\ensuremath{\pm}",
        "–": "--",
    }
)


@dataclass(frozen=True)
class Table:
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]  # per column: right-aligned

    def __post_init__(self) -> None:
        widths = {len(row) for row in (self.header, self.numeric, *self.rows)}
        if len(widths) != 1:
            raise ValueError(f"rows of a table differ in length: {sorted(widths)}")


def accuracy_table(results: Sequence[AccuracyResult]) -> Table:
    """One row per student, one column per benchmark: mean ± standard deviation, in percent."""
    benchmarks = list(dict.fromkeys(result.benchmark for result in results))
    students = list(dict.fromkeys((result.method, result.budget) for result in results))
    found = {(result.method, result.budget, result.benchmark): result for result in results}
    header = ["method", "B", *(_benchmark_heading(benchmark, results) for benchmark in benchmarks)]
    rows = []
    for method, budget in students:
        cells = [found.get((method, budget, benchmark)) for benchmark in benchmarks]
        rows.append((method, _budget(budget), *(accuracy_cell(cell) if cell else MISSING for cell in cells)))
    return Table(tuple(header), tuple(rows), (False, True) + (True,) * len(benchmarks))


def accuracy_detail_table(results: Sequence[AccuracyResult]) -> Table:
    """One row per student and benchmark, with interval, problems and seeds."""
    header = ("benchmark", "method", "B", "metric", "mean ± std (%)", "interval (%)", "problems", "seeds")
    benchmarks = list(dict.fromkeys(result.benchmark for result in results))
    ordered = sorted(results, key=lambda result: benchmarks.index(result.benchmark))
    rows = tuple(
        (
            result.benchmark,
            result.method,
            _budget(result.budget),
            f"Acc@{result.samples}",
            accuracy_cell(result),
            _interval_cell(result.interval),
            f"{result.num_problems:,}",
            str(result.num_seeds),
        )
        for result in ordered
    )
    return Table(header, rows, (False, False, True, False, True, True, True, True))


def loss_table(curves: Sequence[LossCurve]) -> Table:
    """One row per run: its training data, first and last training loss, and held-out loss if there is one."""
    header = ["method", "B", "steps", "trajectories", "target tokens", "first loss", "last loss"]
    if any(curve.held_out for curve in curves):
        header += ["held out before", "lowest (step)", "after"]
    rows = []
    for curve in curves:
        last = curve.training[-1] if curve.training else CurvePoint(0, 0, 0, math.nan)
        row = [curve.method, _budget(curve.budget)]
        row += [f"{count:,}" for count in (len(curve.training), last.trajectories, last.target_tokens)]
        row += [_first_loss(curve.training), _last_loss(curve.training)]
        if len(header) > len(row):
            row += [_first_loss(curve.held_out), _lowest_loss(curve.held_out), _last_loss(curve.held_out)]
        rows.append(tuple(row))
    return Table(tuple(header), tuple(rows), (False,) + (True,) * (len(header) - 1))


def selection_table(comparison: SelectionComparison) -> Table:
    """One row per selection: size, length, the teachers with the most weight, and the most similar selection."""
    header = ("method", "B", "trajectories", "mean tokens", "most weight", "most similar (Jaccard)")
    rows = tuple(
        (
            profile.method,
            str(profile.budget),
            f"{profile.trajectories:,}",
            f"{profile.mean_tokens:,.1f}",
            ", ".join(f"{teacher} {share:.0%}" for teacher, share in sorted(profile.teachers, key=_by_share)[:3]),
            _most_similar(comparison, index),
        )
        for index, profile in enumerate(comparison.profiles)
    )
    return Table(header, rows, (False, True, True, True, False, False))


def _by_share(teacher: tuple[str, float]) -> tuple[float, str]:
    return -teacher[1], teacher[0]


def _most_similar(comparison: SelectionComparison, index: int) -> str:
    """Among selections of the same budget: larger ones overlap more because of their size."""
    own = comparison.profiles[index]
    others = [
        (overlap, profile.method)
        for profile, overlap in zip(comparison.profiles, comparison.overlap[index], strict=True)
        if profile.budget == own.budget and profile is not own
    ]
    if not others:
        return MISSING
    overlap, method = max(others, key=lambda other: other[0])
    return f"{method} ({overlap:.2f})"


def _first_loss(points: Sequence[CurvePoint]) -> str:
    return f"{points[0].loss:.4f}" if points else MISSING


def _last_loss(points: Sequence[CurvePoint]) -> str:
    return f"{points[-1].loss:.4f}" if points else MISSING


def _lowest_loss(points: Sequence[CurvePoint]) -> str:
    lowest = min(points, key=lambda point: point.loss, default=None)
    return MISSING if lowest is None else f"{lowest.loss:.4f} ({lowest.step:,})"


def accuracy_cell(result: AccuracyResult) -> str:
    """`41.3 ± 0.6` in percent; a note if the mean or the standard deviation is missing."""
    if not math.isfinite(result.mean):
        return "not measured"
    if result.spread is None:
        return f"{100 * result.mean:.1f} (one seed)" if result.num_seeds == 1 else f"{100 * result.mean:.1f} (no std)"
    return f"{100 * result.mean:.1f} ± {100 * result.spread:.1f}"


def text_table(table: Table) -> str:
    """Aligned plain text with a rule below the header; every line has the same display width."""
    lines = [_one_line_cells(line) for line in (table.header, *table.rows)]
    widths = [max(_display_width(line[column]) for line in lines) for column in range(len(table.header))]
    padded = ["  ".join(map(_pad, line, widths, table.numeric)) for line in lines]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([padded[0], rule, *padded[1:]])


def markdown_table(table: Table) -> str:
    """GitHub-flavoured markdown; `|` and line breaks inside cells are escaped."""
    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    lines = [_one_line_cells(line) for line in (table.header, *table.rows)]
    escaped = [[cell.replace("\\", "\\\\").replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [escaped[0], rule, *escaped[1:]])


def csv_table(table: Table) -> str:
    """A header and one line per row, quoted where needed (RFC 4180, but with single line feeds)."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([table.header, *table.rows])
    return stream.getvalue()


def latex_table(table: Table, rule_before_last: bool = False) -> str:
    """A `tabular` for the package booktabs, with special characters escaped.

    `rule_before_last` adds a rule above the last row, for totals.
    """
    columns = "".join("r" if numeric else "l" for numeric in table.numeric)
    rows = [_latex_row(row) for row in table.rows]
    if rule_before_last:
        rows.insert(-1, r"\midrule")
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _latex_row(table.header), r"\midrule", *rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def terminal_report(content: ReportContent) -> str:
    """What a run prints at its end: the accuracy table, and for each stage its counts and skipped records."""
    blocks = [content.title]
    if content.results:
        blocks.append(text_table(accuracy_detail_table(content.results)))
        if content.interval_note:
            blocks.append(f"interval: {content.interval_note}")
    else:
        blocks.append("no evaluation in this experiment")
    if content.stages:
        blocks.append("\n".join(_stage_line(stage) for stage in content.stages))
    return "\n\n".join(blocks)


def _stage_line(stage: StageSummary) -> str:
    """Leaves out counts of zero, but always shows the number of skipped records."""
    counts = [f"{count.value:,} {count.name}" for count in stage.counts if count.value]
    return f"{stage.stage}: " + ", ".join([*counts, f"{len(stage.skipped):,} skipped"])


def _benchmark_heading(benchmark: str, results: Sequence[AccuracyResult]) -> str:
    of_benchmark = [result for result in results if result.benchmark == benchmark]
    metric = "/".join(f"Acc@{samples}" for samples in sorted({result.samples for result in of_benchmark}))
    problems = "/".join(f"{count:,}" for count in sorted({result.num_problems for result in of_benchmark}))
    return f"{benchmark} {metric} (n={problems})"


def _budget(budget: int | None) -> str:
    return MISSING if budget is None else str(budget)


def _interval_cell(interval: tuple[float, float] | None) -> str:
    if interval is None or not all(math.isfinite(end) for end in interval):
        return MISSING
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _one_line_cells(cells: Sequence[str]) -> list[str]:
    """Cells without line breaks and control characters, which a terminal would obey."""
    return ["".join(mark for mark in " ".join(cell.split()) if mark.isprintable()) for cell in cells]


def _display_width(text: str) -> int:
    """Terminal columns of `text`: two for wide characters, none for combining marks."""
    return sum(0 if unicodedata.combining(mark) else 1 + (unicodedata.east_asian_width(mark) in "WF") for mark in text)


def _pad(text: str, width: int, numeric: bool) -> str:
    space = " " * (width - _display_width(text))
    return space + text if numeric else text + space


def _latex_row(cells: tuple[str, ...]) -> str:
    return " & ".join(" ".join(cell.split()).translate(_LATEX) for cell in cells) + r" \\"
