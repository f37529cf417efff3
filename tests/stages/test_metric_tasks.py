"""Stage "score" as tasks: what a metric that is added, changed or broken does to the others."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from score_records import random_record, score_record

from lark_jax.config import SCORE_METRICS, Experiment, ScoreConfig, experiment_from_mapping
from lark_jax.errors import ConfigError, PipelineError
from lark_jax.finetuning.run_fingerprint import FREE_FIELDS
from lark_jax.pool import Pool, read_pool
from lark_jax.pool.store import StoredTrajectories
from lark_jax.runtime.files import write_jsonl
from lark_jax.runtime.pipeline import Outcome, Task, read_manifest, require_current, run_tasks
from lark_jax.scoring import read_scores, write_scores
from lark_jax.scoring.metric_columns import MetricColumns
from lark_jax.stages.layout import Layout
from lark_jax.stages.metric_task import Metric, MetricResult, metric_task
from lark_jax.stages.metrics import METRICS
from lark_jax.stages.score import STATISTICS
from lark_jax.stages.score_table import score_tasks

TEXTS = ("Therefore we check it.", "We might verify this, since it is short.", "4")


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    rows = [
        {
            "problem_id": f"p{problem}",
            "candidate_id": f"c{candidate}",
            "teacher": "t",
            "messages": [{"role": "user", "content": f"{problem}?"}, {"role": "assistant", "content": text}],
        }
        for problem in range(2)
        for candidate, text in enumerate(TEXTS)
    ]
    write_jsonl(tmp_path / "pool.jsonl", rows)
    (tmp_path / "student").mkdir()
    values = {
        "workdir": str(tmp_path / "run"),
        "stages": ("score", "select"),
        "student": {"path": str(tmp_path / "student")},
        "pool": {"path": str(tmp_path / "pool.jsonl")},
    }
    return experiment_from_mapping(values)


def with_metrics(experiment: Experiment, *names: str) -> Experiment:
    return dataclasses.replace(experiment, score=dataclasses.replace(experiment.score, metrics=names))


def tasks_of(experiment: Experiment) -> list[Task]:
    """The tasks of the stage, with a forward pass that writes random statistics."""
    statistics, *others = score_tasks(experiment, Layout.of(experiment))

    def forward(directory: Path) -> Outcome:
        pool, rng = read_pool(experiment.pool.path, "error"), np.random.default_rng()
        scores = [random_record(rng, t.problem_id, t.candidate_id, teacher=t.teacher) for t in pool.trajectories]
        write_scores(directory / STATISTICS, scores)
        return Outcome({"trajectories": len(scores)}, notes={"tokenizer": "abc"})

    return [dataclasses.replace(statistics, run=forward, everywhere=False), *others]


def table_of(experiment: Experiment) -> Path:
    return Layout.of(experiment).score / "scores.parquet"


def no_inputs(experiment: Experiment, layout: Layout) -> Mapping[str, Any]:
    del experiment, layout
    return {}


def test_the_names_in_the_configuration_are_the_registered_ones() -> None:
    assert set(SCORE_METRICS) == set(METRICS)


def test_only_an_added_metric_runs_and_its_columns_join_the_same_statistics(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tasks(tasks_of(experiment)) == 2
    before = pq.read_table(table_of(experiment))
    capsys.readouterr()

    added = with_metrics(experiment, "rule_quality")
    assert run_tasks(tasks_of(added)) == 2
    printed = capsys.readouterr().err
    assert "score/statistics: up to date" in printed
    assert "score/rule_quality: done (6 trajectories, 6 with values)" in printed
    assert run_tasks(tasks_of(added)) == 0
    after = pq.read_table(table_of(experiment))
    assert after.select(before.column_names).equals(before)
    frequencies = [score.metrics["rule_granularity"] for score in read_scores(table_of(experiment))]
    assert frequencies == [1 / 4, 1 / 8, 0.0] * 2

    assert run_tasks(tasks_of(experiment)) == 1  # removed again: only the join runs
    assert pq.read_table(table_of(experiment)).equals(before)


def test_the_manifest_of_the_table_counts_and_lists_what_each_task_left_out(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def partly(experiment: Experiment, layout: Layout, pool: Pool, directory: Path) -> MetricResult:
        del experiment, layout, directory
        candidates = tuple((t.problem_id, t.candidate_id) for t in pool.trajectories)
        values = np.array([0.5, np.nan, 0.25, 1.0, 1.0, 1.0])
        return MetricResult(MetricColumns(candidates, {"taste": values}), {("p0", "c1"): "no answer"}, {"asked": 9})

    monkeypatch.setitem(METRICS, "rule_quality", Metric(("taste",), no_inputs, partly))
    run_tasks(tasks_of(with_metrics(experiment, "rule_quality")))
    own = read_manifest(Layout.of(experiment).metric("rule_quality"))
    assert own is not None
    assert own.outcome.counts == {"trajectories": 6, "with values": 5, "asked": 9}
    joined = read_manifest(Layout.of(experiment).score)
    assert joined is not None
    assert joined.outcome.counts == {"trajectories": 6, "without rule_quality": 1}
    statistics = read_manifest(Layout.of(experiment).statistics)
    assert statistics is not None
    assert joined.outcome.notes == {"tokenizer": "abc", "versions": statistics.versions}
    (record,) = joined.outcome.skipped
    location = f"{experiment.pool.path}:2"
    expected = {
        "problem_id": "p0",
        "candidate_id": "c1",
        "location": location,
        "reason": "rule_quality: no answer",
    }
    assert record == expected


@pytest.mark.parametrize(
    ("found", "runs"),
    [
        (Outcome({"trajectories": 6}, notes={"max_length": 512, "throughput": 3}), 1),
        (Outcome({"trajectories": 6}, notes={"max_length": 256, "throughput": 2}), 2),
        (Outcome({"trajectories": 6, "truncated": 1}, notes={"max_length": 512, "throughput": 2}), 2),
        (Outcome({"trajectories": 6}, [{"reason": "empty"}], {"max_length": 512, "throughput": 2}), 2),
    ],
    ids=["only speed", "note", "count", "skipped record"],
)
def test_statistics_of_equal_bytes_are_joined_again_if_their_manifest_changed(
    experiment: Experiment, found: Outcome, runs: int
) -> None:
    def tasks(number: int, outcome: Outcome) -> list[Task]:
        statistics, *others = tasks_of(experiment)

        def forward(directory: Path) -> Outcome:
            write_scores(directory / STATISTICS, [score_record()])
            return outcome

        return [dataclasses.replace(statistics, inputs=lambda: {"number": number}, run=forward), *others]

    run_tasks(tasks(1, Outcome({"trajectories": 6}, notes={"max_length": 512, "throughput": 2})))
    assert run_tasks(tasks(2, found)) == runs
    joined = read_manifest(Layout.of(experiment).score)
    assert joined is not None
    assert joined.outcome.notes["max_length"] == found.notes["max_length"]
    assert (joined.outcome.counts, joined.outcome.skipped) == (found.counts, list(found.skipped))


def test_texts_are_read_once_by_the_metric_and_otherwise_only_where_a_value_is_missing(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = StoredTrajectories.__getitem__

    def counted(self: StoredTrajectories, index: int) -> Any:
        trajectory = original(self, index)  # an IndexError ends a loop over all
        read.append(index)
        return trajectory

    def without_texts(experiment: Experiment, layout: Layout, pool: Pool, directory: Path) -> MetricResult:
        del experiment, layout, directory
        values = np.array([0.5, np.nan, 0.25, 1.0, 1.0, 1.0])
        return MetricResult(MetricColumns(tuple(pool.ids()), {"taste": values}), {("p0", "c1"): "no answer"})

    monkeypatch.setattr(StoredTrajectories, "__getitem__", counted)
    layout = Layout.of(experiment)
    run_tasks([metric_task("rule_quality", METRICS["rule_quality"], experiment, layout)])
    assert read == list(range(6))
    read.clear()
    run_tasks([metric_task("taste", Metric(("taste",), no_inputs, without_texts), experiment, layout)])
    assert read == [1]


@pytest.mark.parametrize(
    ("columns", "reasons", "message"),
    [
        ({"other": [1.0] * 6}, {}, r"returned columns \['other'\], expected \['taste'\]"),
        ({"taste": [1.0] * 5}, {}, "other candidates than the pool's"),
        ({"taste": [np.nan] + [1.0] * 5}, {}, "nulls without a reason"),
        ({"taste": [1.0] * 6}, {("p0", "c0"): "tired"}, "reasons without a null"),
    ],
)
def test_a_metric_with_an_incomplete_result_leaves_no_file(
    experiment: Experiment, columns: dict, reasons: dict, message: str
) -> None:
    def broken(experiment: Experiment, layout: Layout, pool: Pool, directory: Path) -> MetricResult:
        del experiment, layout, directory
        length = len(next(iter(columns.values())))
        candidates = tuple((t.problem_id, t.candidate_id) for t in pool.trajectories[:length])
        return MetricResult(MetricColumns(candidates, {n: np.array(v) for n, v in columns.items()}), reasons)

    layout = Layout.of(experiment)
    task = metric_task("taste", Metric(("taste",), no_inputs, broken), experiment, layout)
    with pytest.raises(ValueError, match=message):
        run_tasks([task])
    assert not (layout.metric("taste") / "columns.parquet").exists()


def test_only_files_that_are_read_decide_whether_a_pool_is_scored_again(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, student = tmp_path / "pool", tmp_path / "student"
    pool.mkdir()
    (tmp_path / "pool.jsonl").rename(pool / "a.jsonl")
    experiment = dataclasses.replace(experiment, pool=dataclasses.replace(experiment.pool, path=str(pool)))
    for name in ("config.json", "model.safetensors"):
        (student / name).write_text("{}")
    run_tasks(tasks_of(experiment))

    (pool / "README.md").write_text("x")
    (student / "README.md").write_text("x")
    (student / "original").mkdir()
    (student / "original" / "params.json").write_text("x")
    assert run_tasks(tasks_of(experiment)) == 0

    for file, changed in [
        (pool / "a.jsonl", "pool"),
        (student / "model.safetensors", "student"),
        (student / "tokenizer_config.json", "student"),
    ]:
        capsys.readouterr()
        file.write_text(file.read_text() + " " if file.exists() else "{}")
        run_tasks(tasks_of(experiment))
        assert f"score/statistics: {changed} changed; starting over" in capsys.readouterr().err


def free_settings(section: str) -> set[str]:
    """Free settings of a section as listed in docs/architecture.md, up to those that are free under a condition."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    (listed,) = re.findall(rf"^\| `{section}` \| (`[^;\n]+)", text, flags=re.MULTILINE)
    return set(re.findall(r"`(\w+)`", listed))


def test_the_documented_free_settings_are_no_inputs_and_all_others_are(experiment: Experiment) -> None:
    def inputs(**values: Any) -> list[Mapping[str, Any]]:
        score = dataclasses.replace(experiment.score, **values)
        own = dataclasses.replace(experiment, score=dataclasses.replace(score, metrics=("local_naturalness",)))
        return [task.inputs() for task in score_tasks(own, Layout.of(own))[:2]]

    others = {
        "tokens_per_batch": 7,
        "dtype": "float32",
        "vocab_chunk": 7,
        "attention": "dense",
        "parameters": "gathered",
        "natural_context": 7,
        "natural_split": "(?P<end>;)",
    }
    assert {field.name for field in dataclasses.fields(ScoreConfig)} == {*others, "metrics", "judge"}
    assert free_settings("score") == {name for name, value in others.items() if inputs(**{name: value}) == inputs()}
    assert free_settings("finetune") == set(FREE_FIELDS)


def test_selection_without_the_stage_that_a_new_metric_needs_names_it(experiment: Experiment) -> None:
    run_tasks(tasks_of(experiment))
    *_, table = tasks_of(with_metrics(experiment, "rule_quality"))
    with pytest.raises(PipelineError, match=r"rule_quality: nothing finished here yet; add 'score' to config\.stages"):
        require_current(table)


@pytest.mark.parametrize("metrics", [("rule_qualty",), ("rule_quality", "rule_quality")])
def test_unknown_and_repeated_metrics_are_refused(experiment: Experiment, metrics: tuple[str, ...]) -> None:
    with pytest.raises(
        ConfigError, match=r"config\.score\.metrics: expected (distinct values, each )?one of .*'rule_quality'"
    ):
        with_metrics(experiment, *metrics)
