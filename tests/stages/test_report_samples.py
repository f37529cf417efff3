"""The answers on the report's page, read from the files that the evaluation leaves."""

import dataclasses
import json
from pathlib import Path

import pytest

from lark_jax.config import Experiment, experiment_from_mapping
from lark_jax.evaluation.samples import SampleRow, write_sample_table
from lark_jax.runtime import pipeline
from lark_jax.runtime.files import write_jsonl
from lark_jax.runtime.pipeline import Outcome, Task
from lark_jax.stages.layout import BASE, Layout
from lark_jax.stages.report import gather

SAMPLES, SEEDS = 3, (4, 9)


def evaluation_task(layout: Layout, name: str, problems_of: dict[str, int], ending: str = "") -> Task:
    """Leaves rows as the evaluation does; each row's text says what it is."""

    def run(directory: Path) -> Outcome:
        for benchmark, count in problems_of.items():
            rows = [
                SampleRow(
                    str(problem),
                    seed,
                    sample,
                    f"{name} {benchmark} {problem} {seed} {sample}{ending}",
                    None,
                    problem == 1,
                    "",
                    "stop",
                    1,
                )
                for seed in SEEDS
                for problem in range(count)
                for sample in range(SAMPLES)
            ]
            write_jsonl(directory / benchmark / "samples.jsonl", [dataclasses.asdict(row) for row in rows])
        write_sample_table(directory, [])
        summary = {"student": name, "engine": {"engine": "vllm", "reason": ""}, "benchmarks": [], "fingerprint": ""}
        (directory / "summary.json").write_text(json.dumps(summary))
        return Outcome(counts={})

    return Task(f"evaluate/{name}", layout.evaluation(name), dict, run)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    for name, count in (("many", 5), ("single", 1)):
        records = [{"problem": f"{name} asks {index}", "answer": str(index)} for index in range(count)]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    return experiment_from_mapping(
        {
            "workdir": str(tmp_path / "run"),
            "student": {"path": str(tmp_path / "student")},
            "pool": {"path": "pool.jsonl"},
            "select": {"methods": ("lark",), "budgets": (1, 2)},
            "evaluate": {"benchmarks": tuple(str(tmp_path / f"{name}.json") for name in ("many", "single"))},
        }
    )


def test_the_first_answers_of_every_evaluated_student_are_shown(experiment: Experiment) -> None:
    layout = Layout.of(experiment)
    names = (BASE, "lark_B2")  # lark_B1 was not evaluated
    pipeline.run_tasks([evaluation_task(layout, name, {"many": 5, "single": 1}) for name in names])
    shown = [
        (s.student, s.benchmark, s.problem, s.gold, s.response, s.correct) for s in gather(experiment, layout).samples
    ]
    assert shown == [
        (
            label,
            benchmark,
            f"{benchmark} asks {problem}",
            str(problem),
            f"{name} {benchmark} {problem} 4 0",
            problem == 1,
        )
        for benchmark, problem in (("many", 0), ("many", 1), ("single", 0))
        for label, name in (("base", BASE), ("lark B=2", "lark_B2"))
    ]


def test_without_evaluation_there_are_no_answers_and_benchmarks_are_not_read(experiment: Experiment) -> None:
    for path in experiment.evaluate.benchmarks:
        Path(path).unlink()
    assert gather(experiment, Layout.of(experiment)).samples == ()


def test_of_long_texts_the_page_gets_beginning_and_end(experiment: Experiment) -> None:
    layout, long = Layout.of(experiment), " word" * 100_000 + " end"
    Path(experiment.evaluate.benchmarks[1]).write_text(json.dumps([{"problem": "single" + long, "answer": "0"}]))
    pipeline.run_tasks([evaluation_task(layout, BASE, {"many": 5, "single": 1}, ending=long)])
    *_, sample = gather(experiment, layout).samples
    for text, beginning in ((sample.problem, "single word"), (sample.response, "base single 0 4 0 word")):
        assert text.startswith(beginning)
        assert text.endswith(" word end")
        assert "characters left out" in text
        assert len(text) < 5_000
