"""The stages of an experiment: configuration and files in, tasks out."""

import os
from collections.abc import Callable
from pathlib import Path

from lark_jax.config import STAGES, Experiment
from lark_jax.errors import ConfigError
from lark_jax.evaluation.benchmarks import benchmark_source
from lark_jax.evaluation.prompts import BUILT_IN_PROMPTS
from lark_jax.finetuning.loggers import require_installed
from lark_jax.pool.sources import is_hub_id
from lark_jax.runtime import processes
from lark_jax.runtime.pipeline import Task
from lark_jax.runtime.terminal import say
from lark_jax.stages.evaluate import check_evaluation, evaluate_tasks
from lark_jax.stages.export import export_tasks
from lark_jax.stages.finetune import finetune_tasks
from lark_jax.stages.judge import waits_for_the_accelerator
from lark_jax.stages.layout import Layout
from lark_jax.stages.prepare import prepare_tasks
from lark_jax.stages.report import report_tasks
from lark_jax.stages.score_table import score_tasks
from lark_jax.stages.select import select_tasks
from lark_jax.students.checkpoint.hub import may_be_hub_id

__all__ = [
    "ACCELERATOR_STAGES",
    "Layout",
    "check_paths",
    "check_stages",
    "earlier_tasks",
    "plan_tasks",
    "warn_blocked_stages",
]

PLANNERS: dict[str, Callable[[Experiment, Layout], list[Task]]] = {
    "prepare": prepare_tasks,
    "score": score_tasks,
    "select": select_tasks,
    "finetune": finetune_tasks,
    "export": export_tasks,
    "evaluate": evaluate_tasks,
    "report": report_tasks,
}


# After these the accelerator is released: an evaluation engine and JAX do not share one.
ACCELERATOR_STAGES = ("prepare", "score", "select", "finetune", "export")
ONE_PROCESS_STAGES = ("prepare", "export")
STUDENT_STAGES = {"score", "finetune", "export", "evaluate"}  # they read the student


def plan_tasks(experiment: Experiment) -> list[Task]:
    """Tasks of the experiment's stages, in the order of their dependencies."""
    return _tasks(experiment, [stage for stage in STAGES if stage in experiment.stages])


def earlier_tasks(experiment: Experiment) -> list[Task]:
    """Tasks of earlier stages that the experiment builds on but does not run."""
    last = max(STAGES.index(stage) for stage in experiment.stages)
    earlier = [stage for stage in STAGES[:last] if stage not in experiment.stages]
    return _tasks(experiment, [stage for stage in earlier if stage != "prepare" or experiment.synthetic is not None])


def check_paths(experiment: Experiment) -> None:
    """Checks, before hours of work are spent, that files and packages that a stage will need exist, and the benchmarks.

    Paths below the working directory are skipped, since stages write them.

    Raises:
      ConfigError: names the field.
      EvaluationError: a benchmark cannot be fetched from the hub, or `check_evaluation` refuses it.
    """
    if "finetune" in experiment.stages:
        require_installed(experiment.finetune.loggers)
    evaluating = "evaluate" in experiment.stages
    here = [] if is_hub_id(experiment.pool.path) else [("pool.path", experiment.pool.path)]
    paths = [*here, ("student.chat_template", experiment.student.chat_template)]
    if set(experiment.stages) & STUDENT_STAGES and not may_be_hub_id(experiment.student.path):
        paths += [("student.path", experiment.student.path)]
    judge = experiment.score.judge
    if "score" in experiment.stages and "judge" in experiment.score.metrics:
        paths += [("score.judge.prompt_file", judge.prompt_file)]
        paths += [("score.judge.model", judge.model if judge.engine == "vllm" else None)]
    if evaluating:
        sources = [benchmark_source(entry) for entry in experiment.evaluate.benchmarks]
        paths += [("evaluate.benchmarks", source.location) for source in sources if not source.on_hub]
        for source in sources:
            if source.on_hub:
                source.local_file()
        prompts = experiment.evaluate.system_prompts
        paths += [("evaluate.system_prompts", None if prompts in BUILT_IN_PROMPTS else prompts)]
        paths += [("evaluate.python", experiment.evaluate.python)]
    root = Path(experiment.workdir).resolve()
    for field, path in paths:
        if path is not None and root not in Path(path).resolve().parents and not Path(path).exists():
            raise ConfigError(f"config.{field}: {path}: no such file or folder")
    key = judge.key_variable
    asks = "score" in experiment.stages and "judge" in experiment.score.metrics and judge.engine == "openai"
    if asks and key is not None and not os.environ.get(key, "").strip():
        raise ConfigError(f"config.score.judge.key_variable: the environment variable {key} is not set")
    if evaluating and processes.is_first():  # the only one that evaluates
        check_evaluation(experiment)


def check_stages(experiment: Experiment, num_processes: int) -> None:
    """Raises ConfigError, which names those that can, for stages that cannot run in several processes."""
    single = [stage for stage in experiment.stages if stage in ONE_PROCESS_STAGES]
    if num_processes > 1 and single:
        others = [stage for stage in experiment.stages if stage not in ONE_PROCESS_STAGES]
        raise ConfigError(
            f"config.stages: {', '.join(single)} run in one process, and this run has {num_processes}; use "
            f"--config.stages={','.join(others) or 'score,select'} here, and one process for the rest"
        )


def warn_blocked_stages(experiment: Experiment) -> None:
    """Announces early that a run will have to stop, before hours of work."""
    if "score" in experiment.stages and waits_for_the_accelerator(experiment):
        say(
            "score/judge: vLLM needs the accelerator that this process holds; unless its verdicts exist already, this "
            "run stops before the judge, keeps the rest of the stage, and prints how to continue"
        )


def _tasks(experiment: Experiment, stages: list[str]) -> list[Task]:
    layout = Layout.of(experiment)
    return [task for stage in stages for task in PLANNERS[stage](experiment, layout)]
