"""A new version of the rendering re-runs the stages that use tokens."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from score_records import random_record

from lark_jax import rendering
from lark_jax.config import Experiment, SyntheticConfig, experiment_from_mapping
from lark_jax.errors import PipelineError
from lark_jax.pool import Pool, read_pool
from lark_jax.pool.synthetic import write_synthetic
from lark_jax.rendering.chat import load_chat_format
from lark_jax.runtime.pipeline import MANIFEST, Outcome, Task, read_manifest, require_current, run_tasks
from lark_jax.scoring import statistics, write_scores
from lark_jax.scoring import workload as workload_module
from lark_jax.scoring.workload import hash_of_texts
from lark_jax.stages import Layout, plan_tasks
from lark_jax.stages import student as student_module
from lark_jax.stages.layout import STUDENT
from lark_jax.stages.score import STATISTICS
from lark_jax.stages.student import scored_with

EXPERIMENT = {
    "synthetic": {"num_problems": 6, "num_test_problems": 1, "rollouts": 1, "num_pretrain_problems": 50},
    "stages": ("prepare", "score", "select", "finetune", "export"),
    "score": {"metrics": ("rule_quality",)},
    "select": {"methods": ("lark", "random"), "budgets": (2,)},
}


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    student, pool = tmp_path / "prepare/pretrain/student", tmp_path / "prepare/data/pool.jsonl"
    paths = {"workdir": str(tmp_path), "student": {"path": str(student)}, "pool": {"path": str(pool)}}
    return experiment_from_mapping({**EXPERIMENT, **paths})


def light_tasks(experiment: Experiment) -> list[Task]:
    """The tasks of all stages; those that need a model write a stand-in, the same in every run."""
    layout = Layout.of(experiment)

    def pretrain(directory: Path) -> Outcome:
        shutil.copytree(layout.prepared_data / STUDENT, directory / STUDENT)
        (directory / STUDENT / "model.safetensors").write_text("weights")
        return Outcome(counts={})

    def score(directory: Path) -> Outcome:
        rng = np.random.default_rng(0)
        trajectories = read_pool(experiment.pool.path).trajectories
        scores = [random_record(rng, t.problem_id, t.candidate_id, teacher=t.teacher) for t in trajectories]
        write_scores(directory / STATISTICS, tuple(scores))
        return Outcome(counts={}, notes=scored_with(experiment, layout, load_chat_format(experiment.student.path)))

    def nothing(_: Path) -> Outcome:
        return Outcome(counts={})

    stand_ins: Mapping[str, Callable[[Path], Outcome]] = {
        "prepare/pretrain": pretrain,
        "score/statistics": score,
        **{f"{stage}/{run.name}": nothing for stage in ("finetune", "export") for run in layout.runs},
    }
    return [dataclasses.replace(task, run=stand_ins.get(task.name, task.run)) for task in plan_tasks(experiment)]


def ran(tasks: list[Task]) -> list[str]:
    """Names of the tasks that had to run."""
    return [task.name for task in tasks if run_tasks([task])]


def raise_version(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
    for module in modules:
        monkeypatch.setattr(module, "RENDERING_VERSION", rendering.RENDERING_VERSION + 1)


def test_raising_it_runs_score_select_and_finetune_again_and_nothing_that_does_not_build_on_them(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [task.name for task in light_tasks(experiment)]
    assert ran(light_tasks(experiment)) == names
    assert ran(light_tasks(experiment)) == []
    raise_version(monkeypatch, student_module)
    again = ran(light_tasks(experiment))
    first_hand = ["score/statistics", "score", "select/lark_B2", "select/random_B2"]
    first_hand += ["finetune/lark_B2", "finetune/random_B2"]
    assert [name for name in again if not name.startswith("export/")] == first_hand
    assert set(names) - set(again) == {"prepare/data", "prepare/pretrain", "score/rule_quality"}
    assert ran(light_tasks(experiment)) == []


def test_a_new_statistic_scores_the_pool_again(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    score = dataclasses.replace(experiment, stages=("prepare", "score"))
    run_tasks(light_tasks(score))
    assert ran(light_tasks(score)) == []
    new = dataclasses.replace(statistics.STATISTICS[0], name="entropy")
    monkeypatch.setattr(statistics, "STATISTICS", (*statistics.STATISTICS, new))
    assert ran(light_tasks(score)) == ["score/statistics"]


def test_the_selection_records_the_version_that_its_scores_were_made_with(experiment: Experiment) -> None:
    run_tasks(light_tasks(dataclasses.replace(experiment, stages=("prepare", "score", "select"))))
    layout = Layout.of(experiment)
    manifest = read_manifest(layout.selection(layout.runs[0]))
    assert manifest is not None
    assert manifest.outcome.notes["scored"]["rendering_version"] == rendering.RENDERING_VERSION


def test_results_from_before_versions_have_version_1(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their manifests have no version."""
    run_tasks(light_tasks(experiment))
    manifests = list(Path(experiment.workdir).rglob(MANIFEST))
    for path in manifests:
        path.write_text(json.dumps(without_versions(json.loads(path.read_text()))))
    assert sum("rendering" in path.read_text() for path in manifests) == 0
    assert ran(light_tasks(experiment)) == ["score"], "whose inputs hash the manifests that this test rewrote"
    for task in light_tasks(experiment):
        require_current(task)
    raise_version(monkeypatch, student_module)
    tasks = {task.name: task for task in light_tasks(experiment)}
    with pytest.raises(PipelineError, match="rendering changed since this was computed; add 'finetune'"):
        require_current(tasks["finetune/lark_B2"])
    capsys.readouterr()
    assert run_tasks([tasks["score/statistics"]]) == 1
    assert "score/statistics: rendering changed; starting over" in capsys.readouterr().err


def without_versions(value: Any) -> Any:
    if isinstance(value, dict):
        later = ("rendering", "rendering_version")
        kept = {key: without_versions(v) for key, v in value.items() if key not in later}
        return {key: v for key, v in kept.items() if key != "statistics" or isinstance(v, str)}  # a hash in others
    return value


def test_token_counts_and_parts_of_a_pass_are_kept_per_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = SyntheticConfig(num_problems=2, num_test_problems=1, rollouts=1, num_pretrain_problems=50)
    write_synthetic(sizes, 0, tmp_path)
    pool: Pool = read_pool(tmp_path / "pool.jsonl")
    chat = load_chat_format(tmp_path / STUDENT)
    before = hash_of_texts(pool, chat, 100)
    assert hash_of_texts(pool, chat, 100) == before
    raise_version(monkeypatch, workload_module)
    assert hash_of_texts(pool, chat, 100) != before
