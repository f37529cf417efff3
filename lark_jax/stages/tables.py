"""Results of evaluated students in working directories -> the paper's Table 1 and lists of all accuracies."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lark_jax.errors import EvaluationError
from lark_jax.evaluation.accuracy import paired_difference
from lark_jax.evaluation.runner import read_student_result
from lark_jax.evaluation.samples import read_correctness
from lark_jax.report.accuracy import EvaluatedStudent
from lark_jax.report.content import leaves
from lark_jax.report.table import csv_table, markdown_table, student_label
from lark_jax.report.table_one import PairedDifference, accuracy_list, difference_table, table_one, table_one_latex
from lark_jax.runtime import files
from lark_jax.runtime.pipeline import read_manifest, require_manifest
from lark_jax.selection import METHODS
from lark_jax.stages.layout import BASE

_RUN_NAME = re.compile(r"(.+)_B(\d+)")
ASKED = ("decoding", "engine", "grader", "system_prompts")  # inputs of an evaluation that compared students must share
REFERENCE = "lark"  # the method that others are compared with, if it was evaluated


@dataclass(frozen=True)
class Evaluation:
    """The folder with the results of one student."""

    method: str
    budget: int | None
    directory: Path

    @property
    def label(self) -> str:
        return student_label(self.method, self.budget)


def find_evaluations(workdir: Path) -> tuple[Evaluation, ...]:
    """All evaluated students of a working directory, in the order of the paper's Table 1.

    Raises:
      EvaluationError: there are none.
    """
    found = []
    for directory in sorted((workdir / "evaluate").glob("*")):
        match = _RUN_NAME.fullmatch(directory.name)
        if (match or directory.name == BASE) and read_manifest(directory) is not None:
            method, budget = (match[1], int(match[2])) if match else (BASE, None)
            found.append(Evaluation(method, budget, directory))
    if not found:
        raise EvaluationError(f"{workdir}: no evaluated student in this working directory; run the stage evaluate")
    return in_order(found)


def in_order(evaluations: Sequence[Evaluation]) -> tuple[Evaluation, ...]:
    """The student before fine-tuning, the baselines, LARK, then others by name; each by budget."""
    known = [BASE, *(name for name in METHODS if name != REFERENCE), REFERENCE]
    order = {name: place for place, name in enumerate(known)}
    return tuple(sorted(evaluations, key=lambda e: (order.get(e.method, len(known)), e.method, e.budget or 0)))


def require_same_settings(evaluations: Sequence[Evaluation]) -> None:
    """Refuses students that were evaluated with different settings: their accuracies are not comparable.

    Raises:
      EvaluationError: names two folders and the fields and values in which their manifests differ.
    """
    first, *others = (found.directory for found in evaluations)
    asked = _asked(first)
    for other in others:
        of_other = _asked(other)
        differing = [name for name in sorted({*asked, *of_other}) if asked.get(name) != of_other.get(name)]
        if differing:
            values = ", ".join(f"{name} {asked.get(name)} and {of_other.get(name)}" for name in differing)
            raise EvaluationError(
                f"{first} and {other} are not comparable: {values}; evaluate them with the same settings or make "
                "separate tables"
            )


def _asked(directory: Path) -> dict[str, Any]:
    inputs = require_manifest(directory, "evaluate").inputs
    return dict(leaves({name: inputs.get(name) for name in ASKED}))


def read_students(model: str, evaluations: Sequence[Evaluation]) -> tuple[EvaluatedStudent, ...]:
    return tuple(
        EvaluatedStudent(model, found.method, found.budget, read_student_result(found.directory).benchmarks)
        for found in evaluations
    )


def paired_differences(model: str, evaluations: Sequence[Evaluation]) -> tuple[PairedDifference, ...]:
    """LARK minus every other student of its budget and minus the base student; without LARK, the last method.

    Raises:
      EvaluationError: two students answered different problems of a benchmark.
    """
    tuned = [found for found in evaluations if found.budget is not None]
    if not tuned:
        return ()
    reference = REFERENCE if any(found.method == REFERENCE for found in tuned) else tuned[-1].method
    correct = {found: read_correctness(found.directory) for found in evaluations}
    pairs = [
        (one, other)
        for one in tuned
        for other in evaluations
        if one.method == reference and other is not one and other.budget in (None, one.budget)
    ]
    return tuple(row for one, other in pairs for row in _differences(model, one, other, correct))


def _differences(
    model: str, one: Evaluation, other: Evaluation, results: dict[Evaluation, dict]
) -> Iterator[PairedDifference]:
    for benchmark, (ids, correct) in results[one].items():
        if benchmark not in results[other]:
            continue
        other_ids, other_correct = results[other][benchmark]
        if ids != other_ids:
            raise EvaluationError(f"{other.directory}: {benchmark} has other problems than in {one.directory}")
        k = min(correct.shape[2], other_correct.shape[2])
        difference = paired_difference(correct, other_correct, k)
        yield PairedDifference(model, one.label, other.label, benchmark, len(ids), difference)


def write_tables(
    students: Sequence[EvaluatedStudent], differences: Sequence[PairedDifference], directory: Path
) -> None:
    """Writes table_one.md, .csv, .tex; accuracies.csv; differences.md, .csv."""
    table = table_one(students)
    files.write_text(directory / "table_one.md", markdown_table(table) + "\n")
    files.write_text(directory / "table_one.csv", csv_table(table))
    files.write_text(directory / "table_one.tex", table_one_latex(students))
    files.write_text(directory / "accuracies.csv", csv_table(accuracy_list(students)))
    pairs = difference_table(differences)
    files.write_text(directory / "differences.md", markdown_table(pairs) + "\n")
    files.write_text(directory / "differences.csv", csv_table(pairs))
