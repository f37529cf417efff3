"""What a report shows. The report stage fills these records from files; this package reads no files."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lark_jax.evaluation.benchmark_records import BenchmarkProblem
from lark_jax.evaluation.contamination import Audit
from lark_jax.evaluation.samples import GradedSample
from lark_jax.pool.records import SkippedRecord
from lark_jax.report.accuracy import INTERVAL, EvaluatedStudent, accuracy_detail_table
from lark_jax.report.comparison import Comparison
from lark_jax.report.losses import LossCurve
from lark_jax.report.style import Plate
from lark_jax.report.table import Table, text_table
from lark_jax.report.table_one import PairedDifference


@dataclass(frozen=True)
class LongText:
    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """The result of a diagnostic: a section of the page, a PNG file of its figure and a JSON file of its values."""

    link: str  # to the section, at the top of the page
    title: str
    plate: Plate
    table: Table
    table_caption: str
    values: Mapping[str, Any]  # plain data: JSON without NaN
    table_title: str = ""  # folds the table under this title
    opening: LongText | None = None  # shown above the figure
    texts: tuple[LongText, ...] = ()  # below the figure, each folded under its title
    texts_title: str = ""


@dataclass(frozen=True)
class ShownAnswer:
    """One graded answer of one student; long texts are shortened."""

    student: str
    benchmark: str
    problem: BenchmarkProblem
    sample: GradedSample


@dataclass(frozen=True)
class StageSummary:
    """What a stage processed, and every record that it skipped."""

    stage: str
    counts: Mapping[str, int] = field(default_factory=dict)
    skipped: tuple[SkippedRecord, ...] = ()
    manifest: str = "manifest.json"  # named on the page if it shows only some of the records


@dataclass(frozen=True)
class ReportContent:
    title: str
    settings: Mapping[str, str] = field(default_factory=dict)  # configuration fields, named as on the command line
    versions: Mapping[str, str] = field(default_factory=dict)  # software, hardware, engine and benchmarks
    students: tuple[EvaluatedStudent, ...] = ()
    differences: tuple[PairedDifference, ...] = ()
    curves: tuple[LossCurve, ...] = ()
    sections: Mapping[str, Section] = field(default_factory=dict)  # of diagnostics, by name
    answers: tuple[ShownAnswer, ...] = ()
    comparison: Comparison | None = None
    contamination: Audit | None = None
    stages: tuple[StageSummary, ...] = ()


def leaves(node: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a dataclass (the `Experiment`) or nested mappings, in field order."""
    children: Mapping[Any, Any] = node if isinstance(node, Mapping) else {}
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        children = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    for name, value in children.items():
        yield from leaves(value, f"{prefix}.{name}" if prefix else str(name))
    if prefix and not children:
        yield prefix, node


def terminal_report(content: ReportContent) -> str:
    """What a run prints at its end: the accuracy table, and for each stage its counts and skipped records."""
    blocks = [content.title]
    if content.students:
        blocks += [text_table(accuracy_detail_table(content.students)), f"interval: {INTERVAL}"]
    else:
        blocks.append("no evaluation in this experiment")
    if content.stages:
        blocks.append("\n".join(_stage_line(stage) for stage in content.stages))
    return "\n\n".join(blocks)


def _stage_line(stage: StageSummary) -> str:
    """Leaves out counts of zero, but always shows the number of skipped records."""
    counts = [f"{value:,} {name}" for name, value in stage.counts.items() if value]
    return f"{stage.stage}: " + ", ".join([*counts, f"{len(stage.skipped):,} skipped"])
