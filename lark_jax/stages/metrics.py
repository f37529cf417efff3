"""The registry of further metrics of the stage "score".

To add one, write a `Metric` in a module of its own, give it a line here, and add its name to `config.SCORE_METRICS`.
"""

from lark_jax.config import Experiment
from lark_jax.runtime.pipeline import Task
from lark_jax.stages.judge import JUDGE
from lark_jax.stages.layout import Layout
from lark_jax.stages.local_naturalness import LOCAL_NATURALNESS
from lark_jax.stages.metric_task import Metric, metric_task
from lark_jax.stages.rule_quality import RULE_QUALITY

METRICS: dict[str, Metric] = {
    "rule_quality": RULE_QUALITY,
    "local_naturalness": LOCAL_NATURALNESS,
    "judge": JUDGE,  # behind what needs the accelerator: under vLLM it has to wait until this process has ended
}


def metric_tasks(experiment: Experiment, layout: Layout) -> list[Task]:
    """One task for each of `score.metrics`, in the order of `METRICS`."""
    return [
        metric_task(name, metric, experiment, layout)
        for name, metric in METRICS.items()
        if name in experiment.score.metrics
    ]
