"""The six stages of the main job, and `prepare` of the embedded experiment: configuration and files in, tasks out."""

from collections.abc import Callable

from lark_jax.config import STAGES, Experiment
from lark_jax.pipeline import Task
from lark_jax.stages.evaluate import evaluate_tasks
from lark_jax.stages.export import export_tasks
from lark_jax.stages.finetune import finetune_tasks
from lark_jax.stages.layout import Layout
from lark_jax.stages.prepare import prepare_tasks
from lark_jax.stages.report import report_tasks
from lark_jax.stages.score import score_tasks
from lark_jax.stages.select import select_tasks

__all__ = ["Layout", "plan_tasks"]

PLANNERS: dict[str, Callable[[Experiment, Layout], list[Task]]] = {
    "prepare": prepare_tasks,
    "score": score_tasks,
    "select": select_tasks,
    "finetune": finetune_tasks,
    "export": export_tasks,
    "evaluate": evaluate_tasks,
    "report": report_tasks,
}


def plan_tasks(experiment: Experiment) -> list[Task]:
    """Tasks of the stages that the experiment asks for, in the order in which they depend on each other."""
    layout = Layout.of(experiment)
    return [task for stage in STAGES if stage in experiment.stages for task in PLANNERS[stage](experiment, layout)]
