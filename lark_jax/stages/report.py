"""Stage "report": reads the outputs of the other stages and writes `report/index.html`, `table.txt` and tables."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lark_jax.config import Experiment
from lark_jax.evaluation.accuracy import CONFIDENCE, RESAMPLES
from lark_jax.evaluation.contamination import Audit, audit_benchmarks, pool_problems
from lark_jax.evaluation.runner import StudentResult, read_student_result
from lark_jax.finetuning import HeldOutMetrics, StepMetrics, read_held_out, read_metrics
from lark_jax.finetuning.metrics import HELD_OUT, METRICS
from lark_jax.pool.records import SkippedRecord, Trajectory
from lark_jax.report import ReportContent, terminal_report, write_report
from lark_jax.report.comparison import Comparison, excerpt
from lark_jax.report.content import (
    AccuracyResult,
    Count,
    CurvePoint,
    Landscape,
    LandscapeCandidate,
    LossCurve,
    SelectionComparison,
    Setting,
    ShownAnswer,
    StageSummary,
    settings_from,
)
from lark_jax.runtime import environment, files
from lark_jax.runtime.pipeline import MANIFEST, Manifest, Outcome, Task, read_manifest
from lark_jax.scoring import ScoreTable, read_score_table
from lark_jax.selection import METHODS, Choice, method_scores, select_trajectories
from lark_jax.stages.comparison import comparison_of_students, shown_answers
from lark_jax.stages.evaluate import benchmarks_of, engine_of
from lark_jax.stages.layout import BASE, Layout
from lark_jax.stages.pool import open_pool
from lark_jax.stages.score_table import SCORES
from lark_jax.stages.selections import comparison_of, read_picks
from lark_jax.stages.tables import Evaluation, in_order, paired_differences, read_students, write_tables

TABLE = "table.txt"


def report_tasks(experiment: Experiment, layout: Layout) -> list[Task]:
    def inputs() -> dict[str, Any]:
        manifests = sorted(layout.root.glob(f"*/{MANIFEST}")) + sorted(layout.root.glob(f"*/*/{MANIFEST}"))
        found = {
            path.parent.relative_to(layout.root).as_posix(): files.sha256_of_path(path)
            for path in manifests
            if path.parent != layout.report
        }
        return {"settings": [[s.name, s.value] for s in settings_of(experiment)], "manifests": found}

    def write(directory: Path) -> Outcome:
        content = gather(experiment, layout)
        page = write_report(content, directory)
        if students := read_students(_model(experiment), in_order(_evaluated(experiment, layout))):
            write_tables(students, content.differences, directory)
        files.write_text(directory / TABLE, f"{terminal_report(content)}\n\nReport: {page}\n")
        return Outcome(counts={})

    return [Task("report", layout.report, inputs, write)]


def settings_of(experiment: Experiment) -> tuple[Setting, ...]:
    """All fields except those of the processes, on which no result depends."""
    return tuple(s for s in settings_from(experiment) if not s.name.startswith("distributed."))


def gather(experiment: Experiment, layout: Layout) -> ReportContent:
    """Everything that the report shows, from the files of finished tasks; empty where a task did not run."""
    return ReportContent(
        title=f"LARK: {Path(experiment.workdir).name}",
        settings=settings_of(experiment),
        versions=tuple(Setting(name, version) for name, version in _environment(experiment, layout)),
        results=tuple(_results(experiment, layout)),
        interval_note=f"{CONFIDENCE:.0%} percentile bootstrap over problems, {RESAMPLES:,} resamples",
        differences=paired_differences(_model(experiment), in_order(_evaluated(experiment, layout))),
        curves=tuple(_curves(layout)),
        selections=_selections(layout),
        landscape=_landscape(experiment, layout),
        answers=_answers(experiment, layout),
        comparison=_comparison(experiment, layout),
        contamination=_contamination(experiment, layout),
        stages=tuple(_summaries(layout)),
    )


def _environment(experiment: Experiment, layout: Layout) -> Iterator[tuple[str, str]]:
    """Software and hardware of the stages that made the results, engine and benchmarks of the evaluation."""
    metrics = [layout.metric(name) for name in experiment.score.metrics]
    asked = [layout.evaluation(name) for name in ("benchmarks", "engine")]
    manifests = _manifests([layout.statistics, *metrics, *_counted(layout), *asked])
    ran = [(manifest.name, manifest.versions) for manifest in manifests]
    yield from environment.software_of([*ran, ("report", environment.package_versions())])
    for directory in (layout.statistics, *(layout.finetune(run) for run in layout.runs)):
        if (manifest := read_manifest(directory)) is not None:
            yield f"hardware of {manifest.name}", manifest.hardware
    if read_manifest(layout.evaluation("engine")) is not None:
        engine = engine_of(layout)
        yield "evaluation engine", f"{engine.engine} ({engine.reason})"
    if (manifest := read_manifest(layout.evaluation("benchmarks"))) is not None:
        for name, described in manifest.outcome.notes.items():
            yield f"benchmark {name}", _benchmark_line(described)


def _benchmark_line(described: Mapping[str, Any]) -> str:
    editions = {"known": ", published texts", "unknown": ", not the published texts"}
    line = f"{described['problems']:,} problems, fingerprint {described['content_fingerprint'][:12]}"
    return line + editions.get(described["edition"], "")


def _results(experiment: Experiment, layout: Layout) -> Iterator[AccuracyResult]:
    for found in _evaluated(experiment, layout):
        yield from _accuracies(found.method, found.budget, read_student_result(found.directory))


def _model(experiment: Experiment) -> str:
    return Path(experiment.workdir).resolve().name


def _evaluated(experiment: Experiment, layout: Layout) -> tuple[Evaluation, ...]:
    """Every student of the experiment whose evaluation is finished."""
    base = [Evaluation(BASE, None, layout.evaluation(BASE))] if experiment.evaluate.include_base else []
    tuned = [Evaluation(run.method.name, run.budget, layout.evaluation(run.name)) for run in layout.runs]
    return tuple(found for found in (*base, *tuned) if read_manifest(found.directory) is not None)


def _accuracies(method: str, budget: int | None, result: StudentResult) -> Iterator[AccuracyResult]:
    for benchmark in result.benchmarks:
        yield AccuracyResult(
            method=method,
            budget=budget,
            benchmark=benchmark.benchmark,
            samples=benchmark.samples,
            num_problems=benchmark.num_problems,
            num_seeds=len(benchmark.seeds),
            mean=benchmark.accuracy.mean,
            std=benchmark.accuracy.std,
            interval=(benchmark.accuracy.low, benchmark.accuracy.high),
        )


def _answers(experiment: Experiment, layout: Layout) -> tuple[ShownAnswer, ...]:
    students = _evaluated(experiment, layout)
    return tuple(shown_answers(benchmarks_of(experiment), students)) if students else ()


def _comparison(experiment: Experiment, layout: Layout) -> Comparison | None:
    students = _evaluated(experiment, layout)
    return comparison_of_students(benchmarks_of(experiment), students) if len(students) > 1 else None


def _contamination(experiment: Experiment, layout: Layout) -> Audit | None:
    """The benchmarks that students were evaluated on against the pool that they were trained from."""
    if read_manifest(layout.score) is None or not any(_evaluated(experiment, layout)):
        return None
    pool = open_pool(experiment)
    return audit_benchmarks(benchmarks_of(experiment), pool_problems(pool.by_problem()))


def _curves(layout: Layout) -> Iterator[LossCurve]:
    for run in layout.runs:
        if read_manifest(layout.finetune(run)) is not None:
            yield loss_curve(run.method.name, run.budget, layout.finetune(run))


def loss_curve(method: str, budget: int | None, directory: Path) -> LossCurve:
    """From the logs that the stage `finetune` wrote to `directory`."""
    training = tuple(map(_curve_point, read_metrics(directory / METRICS)))
    return LossCurve(method, budget, training, tuple(map(_curve_point, read_held_out(directory / HELD_OUT))))


def _curve_point(metrics: StepMetrics | HeldOutMetrics) -> CurvePoint:
    return CurvePoint(metrics.step, metrics.trajectories_seen, metrics.target_tokens_seen, metrics.loss)


def _selections(layout: Layout) -> SelectionComparison | None:
    """The finished selections of the experiment compared; None if there are fewer than two."""
    finished = [run for run in layout.runs if read_manifest(layout.selection(run)) is not None]
    if len(finished) < 2 or read_manifest(layout.score) is None:
        return None
    picks = [(run.method.name, run.budget, read_picks(layout.selection(run))) for run in finished]
    return comparison_of(read_score_table(layout.score / SCORES), picks)


def _landscape(experiment: Experiment, layout: Layout) -> Landscape | None:
    """LARK's scores of one problem: the first, in table order, whose weights come from positive margins.

    The budget is the experiment's largest one that leaves a threshold candidate; None without a score table.
    """
    if read_manifest(layout.score) is None:
        return None
    scores, lark = read_score_table(layout.score / SCORES), METHODS["lark"]
    fitting = [budget for budget in experiment.select.budgets if budget < _most_candidates(scores)]
    budget = max(fitting, default=1)
    choices = select_trajectories(scores, lark, budget, experiment.seed).choices
    problem_id = next((c.problem_id for c in choices if not np.isclose(c.weight, 1 / budget)), choices[0].problem_id)
    of_problem = scores.only(problem_id)
    ids = (score.candidate_id for score in of_problem.rows())
    values = dict(zip(ids, method_scores(of_problem, lark, 0), strict=True))
    pool = open_pool(experiment).by_problem()[problem_id]
    chosen = {choice.candidate_id: choice for choice in choices if choice.problem_id == problem_id}
    return Landscape(
        problem_id=problem_id,
        problem=excerpt("\n\n".join(message.content for message in pool[0].prompt)),
        method="lark",
        budget=budget,
        candidates=tuple(
            _candidate(trajectory, values[trajectory.candidate_id], chosen.get(trajectory.candidate_id))
            for trajectory in pool
        ),
    )


def _most_candidates(scores: ScoreTable) -> int:
    return int(np.bincount(scores.codes("problem_id")).max())


def _candidate(trajectory: Trajectory, g_hat: float, choice: Choice | None) -> LandscapeCandidate:
    return LandscapeCandidate(
        candidate_id=trajectory.candidate_id,
        teacher=trajectory.teacher,
        score=g_hat,
        weight=0.0 if choice is None else choice.weight,
        selected=choice is not None,
        text=excerpt(trajectory.response),
    )


def _counted(layout: Layout) -> list[Path]:
    """Folders of the tasks whose record counts the report shows."""
    directories = [layout.prepared_data, layout.pretraining, layout.score]
    directories += [folder(run) for folder in (layout.selection, layout.finetune, layout.export) for run in layout.runs]
    return directories + [layout.evaluation(name) for name in (BASE, *(run.name for run in layout.runs))]


def _manifests(directories: Sequence[Path]) -> list[Manifest]:
    """Those of the finished tasks."""
    return [manifest for directory in directories if (manifest := read_manifest(directory)) is not None]


def _summaries(layout: Layout) -> Iterator[StageSummary]:
    for directory in _counted(layout):
        manifest = read_manifest(directory)
        if manifest is not None:
            yield _summary(manifest, directory / MANIFEST)


def _summary(manifest: Manifest, path: Path) -> StageSummary:
    outcome = manifest.outcome
    counts = tuple(Count(name, value) for name, value in outcome.counts.items())
    return StageSummary(manifest.name, counts, tuple(SkippedRecord(**record) for record in outcome.skipped), str(path))
