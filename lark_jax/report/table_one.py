"""The paper's Table 1: models x methods as rows, budgets x benchmarks as columns; and the same results as lists."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.accuracy import Accuracy, BenchmarkResult, Difference
from lark_jax.report.accuracy import EvaluatedStudent, benchmark_names
from lark_jax.report.table import MISSING, Table, latex_table

AVERAGE = "Avg"
WHOLE = "all"  # in the column "level": the whole benchmark


@dataclass(frozen=True)
class PairedDifference:
    """How much better one student of a model is than another on one benchmark."""

    model: str
    student: str
    other: str
    benchmark: str
    num_problems: int
    difference: Difference


def table_one(students: Sequence[EvaluatedStudent]) -> Table:
    """Acc@n in percent, mean±std over decoding seeds; models, methods and benchmarks in order of first appearance.

    A student before fine-tuning has the same cells for every budget. `Avg` is the unweighted mean over the benchmarks;
    its deviation is that of the seeds' averages. Missing cells are dashes.

    Raises:
      EvaluationError: results are not comparable: different numbers of samples, or different problems under one name.
    """
    _require_comparable(students)
    names, budgets = benchmark_names(students), _budgets(students)
    header = ["Model", "Method"]
    header += [
        f"{'' if budget is None else f'B={budget}'} {name}".strip() for budget in budgets for name in (*names, AVERAGE)
    ]
    found = {(s.model, s.method, s.budget): s for s in students}
    rows = []
    for model, method in dict.fromkeys((s.model, s.method) for s in students):
        row = [model, method]
        for budget in budgets:
            student = found.get((model, method, budget)) or found.get((model, method, None))
            row += _cells(student, names)
        rows.append(tuple(row))
    return Table(tuple(header), tuple(rows), (False, False) + (True,) * (len(header) - 2))


def table_one_latex(students: Sequence[EvaluatedStudent]) -> str:
    """`table_one` as a `tabular` with a line of budgets above the benchmarks; needs the package booktabs."""
    table, names, budgets = table_one(students), benchmark_names(students), _budgets(students)
    width = len(names) + 1
    short = Table(("Model", "Method", *((*names, AVERAGE) * len(budgets))), _without_repeats(table.rows), table.numeric)
    groups = [
        rf"\multicolumn{{{width}}}{{c}}{{{'' if budget is None else f'Budget $B = {budget}$'}}}" for budget in budgets
    ]
    starts = range(3, 3 + width * len(budgets), width)
    rules = "".join(rf"\cmidrule(lr){{{start}-{start + width - 1}}}" for start in starts)
    lines = latex_table(short).splitlines()
    return "\n".join([*lines[:2], " & & " + " & ".join(groups) + r" \\", rules, *lines[2:]]) + "\n"


def accuracy_list(students: Sequence[EvaluatedStudent]) -> Table:
    """One row per student, benchmark, level and k; fractions in [0, 1]; std is empty for one seed."""
    header = ("model", "method", "budget", "benchmark", "level", "k", "mean", "std", "low", "high", "problems", "seeds")
    rows = []
    for student in students:
        who = (student.model, student.method, "" if student.budget is None else str(student.budget))
        for result in student.benchmarks:
            parts = [(WHOLE, result.num_problems, result.by_k)]
            parts += [(level.level, level.num_problems, level.by_k) for level in result.levels]
            for level, num_problems, by_k in parts:
                for accuracy in by_k:
                    sizes = (str(num_problems), str(len(result.seeds)))
                    rows.append((*who, result.benchmark, level, *_figures(accuracy), *sizes))
    return Table(header, tuple(rows), (False, False, True, False, False) + (True,) * 7)


def difference_table(differences: Sequence[PairedDifference]) -> Table:
    """One row per pair of students and benchmark, in percentage points."""
    header = tuple("model,student,minus,benchmark,metric,difference,interval,better on,worse on,n".split(","))
    rows = tuple(
        (
            pair.model,
            pair.student,
            pair.other,
            pair.benchmark,
            f"Acc@{pair.difference.k}",
            f"{100 * pair.difference.mean:+.1f}",
            f"{100 * pair.difference.low:+.1f} to {100 * pair.difference.high:+.1f}",
            str(pair.difference.gained),
            str(pair.difference.lost),
            f"{pair.num_problems:,}",
        )
        for pair in differences
    )
    return Table(header, rows, (False,) * 5 + (True,) * 5)


def _require_comparable(students: Sequence[EvaluatedStudent]) -> None:
    first: dict[str, tuple[EvaluatedStudent, BenchmarkResult]] = {}
    for student in students:
        for result in student.benchmarks:
            other, known = first.setdefault(result.benchmark, (student, result))
            pair = f"{other.model}, {other.label} and {student.model}, {student.label}"
            if known.fingerprint != result.fingerprint:
                raise EvaluationError(f"{result.benchmark}: {pair} answered different problems under this name")
            if known.samples != result.samples:
                raise EvaluationError(
                    f"{result.benchmark}: {pair} are not comparable: Acc@{known.samples} and Acc@{result.samples}; "
                    "evaluate them with the same evaluate.samples"
                )


def _budgets(students: Sequence[EvaluatedStudent]) -> tuple[int | None, ...]:
    """Ascending; a single None where no student was fine-tuned."""
    return tuple(sorted({student.budget for student in students if student.budget is not None})) or (None,)


def _cells(student: EvaluatedStudent | None, names: Sequence[str]) -> list[str]:
    by_name = {} if student is None else {result.benchmark: result.accuracy for result in student.benchmarks}
    cells = [_cell(by_name[name].mean, by_name[name].std) if name in by_name else MISSING for name in names]
    return [*cells, _average([by_name[name] for name in names]) if len(by_name) == len(names) else MISSING]


def _average(accuracies: Sequence[Accuracy]) -> str:
    """The deviation is left out unless all benchmarks have the same number of seeds."""
    mean = statistics.mean(accuracy.mean for accuracy in accuracies)
    if len({len(accuracy.per_seed) for accuracy in accuracies}) > 1:
        return _cell(mean, None)
    per_seed = [statistics.mean(values) for values in zip(*(a.per_seed for a in accuracies), strict=True)]
    return _cell(mean, statistics.stdev(per_seed) if len(per_seed) > 1 else None)


def _cell(mean: float, std: float | None) -> str:
    return f"{100 * mean:.2f}" if std is None else f"{100 * mean:.2f}±{100 * std:.2f}"


def _figures(accuracy: Accuracy) -> tuple[str, ...]:
    values = (accuracy.mean, accuracy.std, accuracy.low, accuracy.high)
    return (str(accuracy.k), *("" if value is None else f"{value:.6f}" for value in values))


def _without_repeats(rows: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """The model's name in its first row only."""
    before = ["", *(row[0] for row in rows)]
    return tuple(("" if row[0] == last else row[0], *row[1:]) for row, last in zip(rows, before, strict=False))
