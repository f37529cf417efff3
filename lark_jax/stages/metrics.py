"""The additional metrics of the stage "score", by name.

To add one, write its `Metric` here or in a module of its own, give it a row in `METRICS`, and add its name to
`config.SCORE_METRICS`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lark_jax.config import Experiment
from lark_jax.pool import Pool
from lark_jax.runtime.pipeline import Task
from lark_jax.scoring.metric_columns import MetricColumns
from lark_jax.scoring.text_rules import COLUMNS, KEYWORDS, indicator_columns
from lark_jax.stages.judge import JUDGE
from lark_jax.stages.layout import Layout
from lark_jax.stages.local_naturalness import LOCAL_NATURALNESS
from lark_jax.stages.metric_task import Metric, MetricResult, metric_task


def _rule_quality(experiment: Experiment, layout: Layout, pool: Pool, directory: Path) -> MetricResult:  # noqa: ARG001
    """Indicators of the texts: needs only the pool, and takes seconds."""
    return MetricResult(MetricColumns(tuple(pool.ids()), indicator_columns(t.response for t in pool.trajectories)))


def _keywords(experiment: Experiment, layout: Layout) -> Mapping[str, Any]:  # noqa: ARG001 (signature of Metric.inputs)
    return {"keywords": KEYWORDS}


METRICS: dict[str, Metric] = {
    "rule_quality": Metric(COLUMNS, _keywords, _rule_quality),
    "local_naturalness": LOCAL_NATURALNESS,
    "judge": JUDGE,  # after all that needs the accelerator: under vLLM it has to wait until this process has ended
}


def metric_tasks(experiment: Experiment, layout: Layout) -> list[Task]:
    """One task for each of `score.metrics`, in the order of `METRICS`."""
    return [
        metric_task(name, metric, experiment, layout)
        for name, metric in METRICS.items()
        if name in experiment.score.metrics
    ]
