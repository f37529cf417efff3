"""An additional metric of the stage "score", as one resumable task that writes `metrics/<name>/columns.parquet`."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lark_jax.config import Experiment
from lark_jax.pool import Pool, SkippedRecord
from lark_jax.runtime.pipeline import Outcome, Task
from lark_jax.scoring.metric_columns import MetricColumns, write_metric
from lark_jax.stages.layout import Layout
from lark_jax.stages.pool import open_pool, pool_inputs
from lark_jax.stages.student import UNRECORDED

COLUMNS = "columns.parquet"


@dataclass(frozen=True)
class MetricResult:
    """Values for all trajectories of the pool, and the reasons for missing ones."""

    columns: MetricColumns
    reasons: Mapping[tuple[str, str], str] = field(default_factory=dict)  # (problem_id, candidate_id) -> why it is null
    counts: Mapping[str, int] = field(default_factory=dict)  # for the manifest, in addition to those of all metrics
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A metric: its columns, its inputs, and how to compute it.

    `inputs` returns what the values depend on besides the pool, as JSON. `compute` may keep its progress in the folder
    that it is given, and must continue from what an interrupted call with equal inputs left there; it returns None in
    all processes but the first.
    """

    columns: tuple[str, ...]
    inputs: Callable[[Experiment, Layout], Mapping[str, Any]]
    compute: Callable[[Experiment, Layout, Pool, Path], MetricResult | None]
    scratch: tuple[str, ...] = ()  # folders to delete when the task has finished
    everywhere: bool = False  # computed by all processes of the run, otherwise only by the first


def metric_task(name: str, metric: Metric, experiment: Experiment, layout: Layout) -> Task:
    def inputs() -> dict[str, Any]:
        return {**pool_inputs(experiment, layout), **metric.inputs(experiment, layout)}

    def run(directory: Path) -> Outcome:
        pool = open_pool(experiment)
        result = metric.compute(experiment, layout, pool, directory)
        if result is None:
            return Outcome(counts={})  # the first process reports for all
        require_complete(name, metric, pool, result)
        write_metric(directory / COLUMNS, result.columns)
        return outcome_of(pool, result)

    return Task(
        f"score/{name}", layout.metric(name), inputs, run, metric.scratch, metric.everywhere, unrecorded=UNRECORDED
    )


def require_complete(name: str, metric: Metric, pool: Pool, result: MetricResult) -> None:
    """Raises ValueError (a bug) unless there are all columns, all trajectories, and a reason for each null."""
    if set(result.columns.values) != set(metric.columns):
        raise ValueError(
            f"metric {name!r} returned columns {sorted(result.columns.values)}, expected {sorted(metric.columns)}"
        )
    if set(result.columns.candidates) != set(pool.ids()):
        raise ValueError(f"metric {name!r} returned other candidates than the pool's")
    if set(result.columns.missing()) != set(result.reasons):
        raise ValueError(f"metric {name!r} returned nulls without a reason, or reasons without a null")


def outcome_of(pool: Pool, result: MetricResult) -> Outcome:
    by_ids = pool.by_ids()
    skipped = [
        asdict(SkippedRecord(*ids, by_ids[ids].location, result.reasons[ids]))
        for ids in pool.ids()
        if ids in result.reasons
    ]
    counts = {"trajectories": len(pool.trajectories), "with values": len(pool.trajectories) - len(skipped)}
    return Outcome(counts={**counts, **result.counts}, skipped=skipped, notes=result.notes)
