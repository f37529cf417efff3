"""The training set of each run of an experiment, and the held-out set that all runs share."""

from pathlib import Path

import numpy as np
import pytest
from score_records import random_record

from lark_jax.config import Experiment, SyntheticConfig, experiment_from_mapping
from lark_jax.errors import PipelineError
from lark_jax.pool import read_pool
from lark_jax.pool.synthetic import write_synthetic
from lark_jax.runtime.pipeline import MANIFEST, Outcome, Task, run_tasks
from lark_jax.scoring import write_scores
from lark_jax.stages.finetune import TrainingData, finetune_tasks, training_data
from lark_jax.stages.layout import STUDENT, Layout
from lark_jax.stages.score import STATISTICS
from lark_jax.stages.score_table import SCORES
from lark_jax.stages.select import select_tasks
from lark_jax.stages.student import open_chat

PROBLEMS = 12


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    sizes = SyntheticConfig(num_problems=PROBLEMS, num_test_problems=1, rollouts=2, num_pretrain_problems=50)
    write_synthetic(sizes, 0, folder)
    return folder


def experiment_with(material: Path, workdir: Path, **finetune: object) -> Experiment:
    return experiment_from_mapping(
        {
            "workdir": str(workdir),
            "student": {"path": str(material / STUDENT), "max_length": 512},
            "pool": {"path": str(material / "pool.jsonl")},
            "stages": ("score", "select", "finetune"),
            "select": {"methods": ("lark", "random", "grape"), "budgets": (1, 2)},
            "finetune": finetune,
        }
    )


def score_at_random(experiment: Experiment, layout: Layout) -> None:
    """A finished score stage, without a student."""
    rng = np.random.default_rng(0)
    scores = [
        random_record(rng, t.problem_id, t.candidate_id, teacher=t.teacher)
        for t in read_pool(experiment.pool.path, "error").trajectories
    ]

    def write(directory: Path) -> Outcome:
        write_scores(directory / (STATISTICS if directory == layout.statistics else SCORES), tuple(scores))
        return Outcome(counts={})

    run_tasks([Task("score/statistics", layout.statistics, dict, write), Task("score", layout.score, dict, write)])


def data_of_all_runs(experiment: Experiment) -> list[TrainingData]:
    layout = Layout.of(experiment)
    score_at_random(experiment, layout)
    run_tasks(select_tasks(experiment, layout))
    chat = open_chat(experiment)
    return [training_data(experiment, layout, chat, run) for run in layout.runs]


def test_all_runs_share_held_out_trajectories_of_problems_that_none_is_trained_on(
    material: Path, tmp_path: Path
) -> None:
    of_runs = data_of_all_runs(experiment_with(material, tmp_path, held_out_fraction=0.25))
    assert len(of_runs) == 6
    held_out = {example.rendered.problem_id for example in of_runs[0].held_out}
    assert len(held_out) == len(of_runs[0].held_out) == 3
    for data in of_runs:
        assert [example.name for example in data.held_out] == [example.name for example in of_runs[0].held_out]
        trained_on = {example.rendered.problem_id for example in data.examples}
        assert not trained_on & held_out
        assert len(trained_on) == PROBLEMS - 3
        assert sum(example.weight for example in data.examples) == pytest.approx(len(data.examples))


def test_nothing_is_held_out_by_default(material: Path, tmp_path: Path) -> None:
    for data in data_of_all_runs(experiment_with(material, tmp_path)):
        assert data.held_out == ()
        assert len({example.rendered.problem_id for example in data.examples}) == PROBLEMS


def test_the_inputs_of_the_stage_include_the_held_out_set(material: Path, tmp_path: Path) -> None:
    experiment = experiment_with(material, tmp_path, held_out_fraction=0.25)
    layout = Layout.of(experiment)
    data_of_all_runs(experiment)
    inputs = finetune_tasks(experiment, layout)[0].inputs()
    assert inputs["finetune"]["held_out_fraction"] == 0.25
    assert {"scores", "pool", "draw"} <= set(inputs)
    assert not {"loggers", "keep_checkpoints", "checkpoint_every"} & set(inputs["finetune"])
    without = experiment_with(material, tmp_path)
    assert not {"scores", "pool", "draw"} & set(finetune_tasks(without, layout)[0].inputs())
    (layout.statistics / MANIFEST).unlink()
    with pytest.raises(PipelineError, match=r"add 'score' to config\.stages"):
        finetune_tasks(experiment, layout)[0].inputs()
