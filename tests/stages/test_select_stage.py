"""The manifest of a selection, and the settings that make a selection again."""

import math
from pathlib import Path

import numpy as np
import pytest
from score_records import random_record, score_record

from lark_jax.config import experiment_from_mapping
from lark_jax.runtime.environment import code_hash
from lark_jax.runtime.files import read_json, write_jsonl
from lark_jax.runtime.pipeline import MANIFEST, Manifest, Outcome, Task, read_manifest, run_tasks
from lark_jax.scoring import write_scores
from lark_jax.selection import METHODS, read_training_set, select_trajectories
from lark_jax.stages.layout import Layout
from lark_jax.stages.score_table import SCORES
from lark_jax.stages.select import outcome_of, select_tasks

SCORED = {"student_sha256": "ab12", "tokenizer_sha256": "cd34", "chat_template_sha256": "ef56"} | dict.fromkeys(
    ("frozen_date", "rendering_version")
)
PROBLEMS, CANDIDATES, BUDGET = 3, 6, 2


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    records = [
        {
            "problem_id": f"p{p}",
            "candidate_id": f"c{c}",
            "teacher": "teacher",
            "messages": [{"role": "user", "content": f"Question {p}?"}, {"role": "assistant", "content": f"{p} {c}"}],
        }
        for p in range(PROBLEMS)
        for c in range(CANDIDATES)
    ]
    write_jsonl(tmp_path / "pool.jsonl", records)
    return tmp_path / "pool.jsonl"


def selected(pool: Path, max_length: int = 512, **select: object) -> Path:
    """Folder of the only selection, made from a finished score stage without a student."""
    experiment = experiment_from_mapping(
        {
            "workdir": str(pool.parent / "run"),
            "student": {"path": "never read"},
            "pool": {"path": str(pool)},
            "stages": ("score", "select"),
            "select": {"methods": ("lark",), "budgets": (BUDGET,), **select},
        }
    )
    layout = Layout.of(experiment)
    run_tasks([scored(layout, max_length)])
    run_tasks(select_tasks(experiment, layout))
    return layout.selection(layout.runs[0])


def scored(layout: Layout, max_length: int) -> Task:
    rng = np.random.default_rng(3)  # the same table on every call, so that it is no reason to select again

    def write(directory: Path) -> Outcome:
        write_scores(
            directory / SCORES,
            [random_record(rng, f"p{p}", f"c{c}") for p in range(PROBLEMS) for c in range(CANDIDATES)],
        )
        return Outcome(counts={}, notes={**SCORED, "max_length": max_length, "dtype": "float32", "throughput": 3})

    return Task("score", layout.score, lambda: {"max_length": max_length}, write)


def manifest_of(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest


def test_the_manifest_has_the_provenance_of_scores_and_selection(pool: Path) -> None:
    folder = selected(pool)
    manifest = manifest_of(folder)
    versions = manifest_of(folder.parents[1] / "score").versions
    assert manifest.outcome.notes["scored"] == {
        **SCORED,
        "max_length": 512,
        "dtype": "float32",
        "versions": versions,
    }
    assert {"scores", "pool", "method", "budget", "seed", "resample"} <= set(manifest.inputs)
    assert manifest.versions["lark_jax code"] == code_hash()
    assert str(pool.parent) not in (folder / MANIFEST).read_text(), "a path of this machine"


def test_scores_of_equal_bytes_with_another_provenance_are_selected_from_again(pool: Path) -> None:
    before = manifest_of(selected(pool))
    after = manifest_of(selected(pool, max_length=256))
    assert after.outcome.notes["scored"]["max_length"] == 256
    assert after.inputs["scores"] == before.inputs["scores"]


def test_a_problem_without_a_choice_is_listed_with_its_own_reason() -> None:
    table = [
        score_record(problem, loss=loss, metrics={"judge": mark})
        for problem, loss, mark in [("judged", 0.5, 0.7), ("unjudged", 0.5, math.nan), ("unscored", math.nan, 0.7)]
    ]
    method = METHODS["judge"]
    outcome = outcome_of(select_trajectories(table, method, 1, seed=0), method)
    assert {record["problem_id"]: record["reason"] for record in outcome.skipped} == {
        "unscored": "no candidate of this problem could be scored",
        "unjudged": "no scored candidate of this problem has a value of method 'judge'; "
        "see metrics/judge/manifest.json",
    }
    assert outcome.counts["problems without candidate"] == 2
    assert all(isinstance(count, int) for count in outcome.counts.values())


def test_resampling_adds_a_file_and_does_not_change_the_weighted_ones(pool: Path) -> None:
    folder = selected(pool)
    before = {path.name: path.read_bytes() for path in folder.glob("train*")}
    assert "train_resampled.jsonl" not in before
    assert selected(pool, resample=5) == folder
    after = {path.name: path.read_bytes() for path in folder.glob("train*")}
    assert after.pop("train_resampled.jsonl").count(b"\n") == PROBLEMS * 5
    assert after == before
    assert set(read_json(folder / "dataset_info.json")) == {"lark_B2", "lark_B2_resampled"}
    assert len(read_training_set(folder)) <= PROBLEMS * BUDGET
