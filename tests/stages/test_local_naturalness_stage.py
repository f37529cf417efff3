"""The metric "local_naturalness" as a task: its column, its reasons, and what makes it run again."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lark_jax.config import Experiment, SyntheticConfig, experiment_from_mapping
from lark_jax.pool.synthetic import write_synthetic
from lark_jax.runtime.files import write_jsonl
from lark_jax.runtime.pipeline import read_manifest, run_tasks
from lark_jax.scoring.metric_columns import read_metric
from lark_jax.stages.layout import Layout
from lark_jax.stages.metric_task import COLUMNS, metric_task
from lark_jax.stages.metrics import METRICS
from lark_jax.students import random_student, read_architecture, save_new_student

NAME = "local_naturalness"
ANSWERS = ("5+3=8. So there are 8 books.", "8! " * 30, "an <|im_end|> inside")
SIZES = SyntheticConfig(num_problems=1, num_test_problems=2, num_pretrain_problems=60, hidden_size=64, num_layers=2)


def experiment_in(folder: Path) -> Experiment:
    write_synthetic(SIZES, 3, folder)
    student = random_student(read_architecture(folder / "student"), 0, "float32")
    save_new_student(student, folder / "student", folder / "weights")
    rows = [
        {
            "problem_id": "p",
            "candidate_id": f"c{candidate}",
            "teacher": "t",
            "messages": [{"role": "user", "content": "5+3?"}, {"role": "assistant", "content": text}],
        }
        for candidate, text in enumerate(ANSWERS)
    ]
    write_jsonl(folder / "pool.jsonl", rows)
    values = {
        "workdir": str(folder / "run"),
        "student": {"path": str(folder / "weights"), "max_length": 256},
        "pool": {"path": str(folder / "pool.jsonl")},
        "score": {"metrics": (NAME,), "tokens_per_batch": 512, "dtype": "float32"},
        "stages": ("score",),
    }
    return experiment_from_mapping(values)


def ran(experiment: Experiment) -> int:
    return run_tasks([metric_task(NAME, METRICS[NAME], experiment, Layout.of(experiment))])


def test_the_column_has_a_score_or_a_reason_and_another_context_runs_again(tmp_path: Path) -> None:
    experiment = experiment_in(tmp_path)
    layout = Layout.of(experiment)
    assert ran(experiment) == 1
    columns = read_metric(layout.metric(NAME) / COLUMNS)
    assert columns.candidates == (("p", "c0"), ("p", "c1"), ("p", "c2"))
    scores = columns.values[NAME]
    assert (scores[:2] < 0).all()
    assert np.isnan(scores[2])
    manifest = read_manifest(layout.metric(NAME))
    assert manifest is not None
    (skipped,) = manifest.outcome.skipped
    assert "control token" in skipped["reason"]
    assert manifest.outcome.counts == {"trajectories": 3, "with values": 2, "steps": 2 + 30}
    assert manifest.outcome.notes["prompts"] == 1
    assert ran(experiment) == 0
    wider = dataclasses.replace(experiment, score=dataclasses.replace(experiment.score, natural_context=40))
    assert ran(wider) == 1
    again = read_metric(layout.metric(NAME) / COLUMNS).values[NAME]
    assert again[0] == pytest.approx(scores[0], rel=1e-6), (
        "the first has two steps: no step has more than one before it"
    )
    assert again[1] != pytest.approx(scores[1], rel=1e-5)
