"""What a report shows. The report stage fills these records from files; this package reads no files."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lark_jax.evaluation.accuracy import Difference
from lark_jax.evaluation.benchmark_records import BenchmarkProblem
from lark_jax.evaluation.contamination import Audit
from lark_jax.evaluation.samples import GradedSample
from lark_jax.pool.records import SkippedRecord
from lark_jax.report.comparison import Comparison


@dataclass(frozen=True)
class AccuracyResult:
    """Acc@k of one student on one benchmark. Accuracies are fractions in [0, 1]."""

    method: str  # selection method, or "base" for the student before fine-tuning
    budget: int | None  # B; None for the base student
    benchmark: str
    samples: int  # k of Acc@k
    num_problems: int
    num_seeds: int
    mean: float  # over decoding seeds
    std: float | None = None  # sample standard deviation over seeds; None or NaN with one seed
    interval: tuple[float, float] | None = None  # confidence interval of the mean; see `interval_note`

    @property
    def student(self) -> str:
        return student_label(self.method, self.budget)

    @property
    def spread(self) -> float | None:
        """The standard deviation; None if there is none to show."""
        return None if self.std is None or not math.isfinite(self.std) else self.std


@dataclass(frozen=True)
class PairedDifference:
    """How much better one student of a model is than another on one benchmark."""

    model: str
    student: str
    other: str
    benchmark: str
    num_problems: int
    difference: Difference


@dataclass(frozen=True)
class CurvePoint:
    """A loss (nats per token), and how far the student had been trained at that point."""

    step: int  # completed optimizer steps
    trajectories: int  # seen so far; a trajectory seen twice counts twice
    target_tokens: int  # seen so far
    loss: float


@dataclass(frozen=True)
class LossCurve:
    """The losses of one run."""

    method: str
    budget: int | None
    training: tuple[CurvePoint, ...]  # weighted loss of each step
    held_out: tuple[CurvePoint, ...] = ()  # unweighted loss, on the same trajectories for all runs

    @property
    def student(self) -> str:
        return student_label(self.method, self.budget)


@dataclass(frozen=True)
class LandscapeCandidate:
    """One candidate of the landscape's problem. `weight` is 0 for candidates that were not selected."""

    candidate_id: str
    teacher: str
    score: float  # g_hat; NaN if the candidate could not be scored
    weight: float = 0.0
    selected: bool = False
    text: str = ""  # the trajectory, shortened if long; shown for selected candidates


@dataclass(frozen=True)
class Landscape:
    """All candidates of one problem under one selection (Figure 9 of the paper)."""

    problem_id: str
    problem: str
    method: str
    budget: int
    candidates: tuple[LandscapeCandidate, ...]

    def by_teacher(self) -> dict[str, tuple[LandscapeCandidate, ...]]:
        """Teachers in order of first appearance, each with its candidates in the given order."""
        groups: dict[str, list[LandscapeCandidate]] = {}
        for candidate in self.candidates:
            groups.setdefault(candidate.teacher, []).append(candidate)
        return {teacher: tuple(group) for teacher, group in groups.items()}

    def selected(self) -> tuple[LandscapeCandidate, ...]:
        """Selected candidates, heaviest first."""
        chosen = [candidate for candidate in self.candidates if candidate.selected]
        return tuple(sorted(chosen, key=lambda candidate: -candidate.weight))


@dataclass(frozen=True)
class SelectionProfile:
    """A summary of one selection: the trajectories with positive weight."""

    method: str
    budget: int
    trajectories: int
    mean_tokens: float  # target tokens per trajectory, unweighted
    teachers: tuple[tuple[str, float], ...]  # name and share of the training weight

    @property
    def name(self) -> str:
        return student_label(self.method, self.budget)


@dataclass(frozen=True)
class SelectionComparison:
    """Selections from one score table, compared."""

    profiles: tuple[SelectionProfile, ...]
    overlap: tuple[tuple[float, ...], ...]  # Jaccard index of the trajectories of every pair


@dataclass(frozen=True)
class ShownAnswer:
    """One graded answer of one student; long texts are shortened."""

    student: str
    benchmark: str
    problem: BenchmarkProblem
    sample: GradedSample


@dataclass(frozen=True)
class Count:
    name: str
    value: int


@dataclass(frozen=True)
class StageSummary:
    """What a stage processed, and every record that it skipped."""

    stage: str
    counts: tuple[Count, ...] = ()
    skipped: tuple[SkippedRecord, ...] = ()
    manifest: str = "manifest.json"  # named on the page if it shows only some of the records


@dataclass(frozen=True)
class Setting:
    """A configuration field, named as on the command line, or a package and its version."""

    name: str
    value: str


@dataclass(frozen=True)
class ReportContent:
    title: str
    settings: tuple[Setting, ...] = ()
    versions: tuple[Setting, ...] = ()
    results: tuple[AccuracyResult, ...] = ()
    interval_note: str = ""  # how `AccuracyResult.interval` was computed
    differences: tuple[PairedDifference, ...] = ()  # intervals computed in the same way
    curves: tuple[LossCurve, ...] = ()
    selections: SelectionComparison | None = None
    landscape: Landscape | None = None
    answers: tuple[ShownAnswer, ...] = ()
    comparison: Comparison | None = None
    contamination: Audit | None = None
    stages: tuple[StageSummary, ...] = ()


def student_label(method: str, budget: int | None) -> str:
    return method if budget is None else f"{method} B={budget}"


def settings_from(section: object) -> tuple[Setting, ...]:
    """Flattens a dataclass (the `Experiment`) or nested mappings into dotted names, in field order."""
    return tuple(Setting(name, repr(value)) for name, value in _leaves(section, ""))


def _leaves(node: object, prefix: str) -> Iterator[tuple[str, Any]]:
    children = _children(node)
    if not prefix or children:
        for name, value in children.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, node


def _children(node: object) -> dict[str, Any]:
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    return {str(name): value for name, value in node.items()} if isinstance(node, Mapping) else {}
