"""The metric "rule_quality": indicators of the texts, from the pool alone, in seconds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lark_jax.config import Experiment
from lark_jax.pool import Pool
from lark_jax.scoring.metric_columns import MetricColumns
from lark_jax.scoring.text_rules import COLUMNS, KEYWORDS, indicator_columns
from lark_jax.stages.layout import Layout
from lark_jax.stages.metric_task import Metric, MetricResult


def _inputs(experiment: Experiment, layout: Layout) -> Mapping[str, Any]:  # noqa: ARG001 (a metric's signature)
    return {"keywords": KEYWORDS}


def _compute(experiment: Experiment, layout: Layout, pool: Pool, directory: Path) -> MetricResult:  # noqa: ARG001
    return MetricResult(MetricColumns(tuple(pool.ids()), indicator_columns(t.response for t in pool.trajectories)))


RULE_QUALITY = Metric(COLUMNS, _inputs, _compute)
