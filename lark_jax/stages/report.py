"""Stage "report": reads the outputs of the other stages and writes `report/index.html`, `table.txt` and tables."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from lark_jax.config import Experiment
from lark_jax.diagnostics import FinishedSelection, Material, compute_sections
from lark_jax.evaluation.contamination import audit_benchmarks, pool_problems
from lark_jax.finetuning import read_held_out, read_metrics
from lark_jax.finetuning.metrics import HELD_OUT, METRICS
from lark_jax.pool.records import Pool, SkippedRecord
from lark_jax.report import ReportContent, terminal_report, write_report
from lark_jax.report.content import StageSummary, leaves
from lark_jax.report.losses import CurvePoint, LossCurve
from lark_jax.runtime import environment, files
from lark_jax.runtime.pipeline import MANIFEST, Manifest, Outcome, Task, read_manifest
from lark_jax.scoring import read_score_table
from lark_jax.selection import TRAIN_PARQUET, Choice
from lark_jax.stages.comparison import comparison_of_students, shown_answers
from lark_jax.stages.evaluate import benchmarks_of, engine_of
from lark_jax.stages.layout import BASE, Layout
from lark_jax.stages.pool import open_pool
from lark_jax.stages.score_table import SCORES
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
        return {"settings": list(settings_of(experiment).items()), "manifests": found}

    def write(directory: Path) -> Outcome:
        content = gather(experiment, layout)
        page = write_report(content, directory)
        if students := read_students(_model(experiment), in_order(_evaluated(experiment, layout))):
            write_tables(students, content.differences, directory)
        files.write_text(directory / TABLE, f"{terminal_report(content)}\n\nReport: {page}\n")
        return Outcome(counts={})

    return [Task("report", layout.report, inputs, write)]


def settings_of(experiment: Experiment) -> dict[str, str]:
    """All fields except those of the processes, on which no result depends."""
    return {name: repr(value) for name, value in leaves(experiment) if not name.startswith("distributed.")}


def gather(experiment: Experiment, layout: Layout) -> ReportContent:
    """Everything that the report shows, from the files of finished tasks; empty where a task did not run."""
    evaluations = _evaluated(experiment, layout)
    benchmarks = benchmarks_of(experiment) if evaluations else ()
    read_pool = functools.cache(lambda: open_pool(experiment))
    material = _material(experiment, layout, read_pool)
    return ReportContent(
        title=f"LARK: {Path(experiment.workdir).name}",
        settings=settings_of(experiment),
        versions=dict(_environment(experiment, layout)),
        students=read_students(_model(experiment), evaluations),
        differences=paired_differences(_model(experiment), in_order(evaluations)),
        curves=tuple(_curves(layout)),
        sections=compute_sections(material),
        answers=tuple(shown_answers(benchmarks, evaluations)),
        comparison=comparison_of_students(benchmarks, evaluations) if len(evaluations) > 1 else None,
        contamination=(
            audit_benchmarks(benchmarks, pool_problems(read_pool().by_problem()))
            if evaluations and material.scores is not None
            else None
        ),
        stages=tuple(_summaries(layout)),
    )


def _material(experiment: Experiment, layout: Layout, read_pool: Callable[[], Pool]) -> Material:
    finished = [run for run in layout.runs if read_manifest(layout.selection(run)) is not None]
    return Material(
        seed=experiment.seed,
        budgets=experiment.select.budgets,
        scores=None if read_manifest(layout.score) is None else read_score_table(layout.score / SCORES),
        selections=tuple(
            FinishedSelection(run.method.name, run.budget, read_choices(layout.selection(run))) for run in finished
        ),
        open_pool=read_pool,
    )


def read_choices(directory: Path) -> tuple[Choice, ...]:
    """The choices of a finished selection that have a positive weight, from its training set."""
    rows = pq.read_table(directory / TRAIN_PARQUET, columns=["weight", "meta"]).to_pylist()
    return tuple(Choice(weight=row["weight"], **row["meta"]) for row in rows)


def _environment(experiment: Experiment, layout: Layout) -> Iterator[tuple[str, str]]:
    """Software and hardware of the stages that made the results, engine and benchmarks of the evaluation."""
    metrics = [layout.metric(name) for name in experiment.score.metrics]
    benchmarks_folder, engine_folder = layout.evaluation("benchmarks"), layout.evaluation("engine")
    made = _manifests([layout.statistics, *metrics, *_counted(layout), benchmarks_folder, engine_folder])
    ran = [(manifest.name, manifest.versions) for manifest in made.values()]
    yield from environment.software_of([*ran, ("report", environment.package_versions())])
    for directory in (layout.statistics, *(layout.finetune(run) for run in layout.runs)):
        if directory in made:
            yield f"hardware of {made[directory].name}", made[directory].hardware
    if engine_folder in made:
        engine = engine_of(layout)
        yield "evaluation engine", f"{engine.engine} ({engine.reason})"
    if benchmarks_folder in made:
        for name, described in made[benchmarks_folder].outcome.notes.items():
            yield f"benchmark {name}", _benchmark_line(described)


def _benchmark_line(described: Mapping[str, Any]) -> str:
    editions = {"known": ", published texts", "unknown": ", not the published texts"}
    line = f"{described['problems']:,} problems, fingerprint {described['content_fingerprint'][:12]}"
    return line + editions.get(described["edition"], "")


def _model(experiment: Experiment) -> str:
    return Path(experiment.workdir).resolve().name


def _evaluated(experiment: Experiment, layout: Layout) -> tuple[Evaluation, ...]:
    """Every student of the experiment whose evaluation is finished."""
    base = [Evaluation(BASE, None, layout.evaluation(BASE))] if experiment.evaluate.include_base else []
    tuned = [Evaluation(run.method.name, run.budget, layout.evaluation(run.name)) for run in layout.runs]
    return tuple(found for found in (*base, *tuned) if read_manifest(found.directory) is not None)


def _curves(layout: Layout) -> Iterator[LossCurve]:
    for run in layout.runs:
        if read_manifest(layout.finetune(run)) is not None:
            yield loss_curve(run.method.name, run.budget, layout.finetune(run))


def loss_curve(method: str, budget: int | None, directory: Path) -> LossCurve:
    """From the logs that the stage `finetune` wrote to `directory`."""
    training, held_out = (
        tuple(CurvePoint(m.step, m.trajectories_seen, m.target_tokens_seen, m.loss) for m in measured)
        for measured in (read_metrics(directory / METRICS), read_held_out(directory / HELD_OUT))
    )
    return LossCurve(method, budget, training, held_out)


def _counted(layout: Layout) -> list[Path]:
    """Folders of the tasks whose counts of records the report shows."""
    directories = [layout.prepared_data, layout.pretraining, layout.score]
    directories += [folder(run) for folder in (layout.selection, layout.finetune, layout.export) for run in layout.runs]
    return directories + [layout.evaluation(name) for name in (BASE, *(run.name for run in layout.runs))]


def _manifests(directories: Sequence[Path]) -> dict[Path, Manifest]:
    """Those of the finished tasks."""
    found = {directory: read_manifest(directory) for directory in directories}
    return {directory: manifest for directory, manifest in found.items() if manifest is not None}


def _summaries(layout: Layout) -> Iterator[StageSummary]:
    for directory, manifest in _manifests(_counted(layout)).items():
        skipped = tuple(SkippedRecord(**record) for record in manifest.outcome.skipped)
        yield StageSummary(manifest.name, manifest.outcome.counts, skipped, str(directory / MANIFEST))
