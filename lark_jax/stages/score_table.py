"""Stage "score": the student's statistics, additional metrics, and a last task that joins them.

`score/scores.parquet` has one row per candidate, with the fixed columns and those of the additional metrics. Each other
task writes a folder of its own below `metrics/`, so that adding a metric does not run the others again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lark_jax.config import Experiment
from lark_jax.runtime import files
from lark_jax.runtime.pipeline import Manifest, Outcome, Task, require_manifest
from lark_jax.scoring.metric_columns import join
from lark_jax.stages.layout import Layout
from lark_jax.stages.metric_task import COLUMNS
from lark_jax.stages.metrics import metric_tasks
from lark_jax.stages.score import STATISTICS, THROUGHPUT, statistics_task

SCORES = "scores.parquet"
VERSIONS = "versions"  # note: of the forward pass; a metric that is added later does not change them


def score_tasks(experiment: Experiment, layout: Layout) -> list[Task]:
    metrics = metric_tasks(experiment, layout)
    return [statistics_task(experiment, layout), *metrics, _join_task(experiment, layout)]


def _join_task(experiment: Experiment, layout: Layout) -> Task:
    metrics = experiment.score.metrics

    def outcome() -> Outcome:
        statistics = require_manifest(layout.statistics, "score")
        return joined_outcome(statistics, {name: require_manifest(layout.metric(name), "score") for name in metrics})

    def inputs() -> dict[str, Any]:
        return {
            "manifests": _outcome_hash(outcome()),
            "statistics": layout.hashes.of(layout.statistics / STATISTICS),
            "metrics": {name: layout.hashes.of(layout.metric(name) / COLUMNS) for name in metrics},
        }

    def run(directory: Path) -> Outcome:
        columns = [layout.metric(name) / COLUMNS for name in metrics]
        join(layout.statistics / STATISTICS, columns, directory / SCORES)
        return outcome()

    return Task("score", layout.score, inputs, run)


def joined_outcome(statistics: Manifest, metrics: Mapping[str, Manifest]) -> Outcome:
    """Counts, notes and skipped records of the statistics, and the records without a value of a metric."""
    counts = dict(statistics.outcome.counts)
    skipped = list(statistics.outcome.skipped)
    for name, manifest in metrics.items():
        counts[f"without {name}"] = len(manifest.outcome.skipped)
        skipped += [{**record, "reason": f"{name}: {record['reason']}"} for record in manifest.outcome.skipped]
    return Outcome(counts, skipped, {**statistics.outcome.notes, VERSIONS: statistics.versions})


def _outcome_hash(outcome: Outcome) -> str:
    """Hash of what the join's manifest repeats, except for the speed, so that the manifest is never out of date."""
    notes = {name: note for name, note in outcome.notes.items() if name != THROUGHPUT}
    return files.sha256_of_json([outcome.counts, outcome.skipped, notes])
