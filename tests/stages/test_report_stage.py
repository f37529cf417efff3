"""What the report gathers from finished tasks: answers of students, and the software of the stages that ran."""

import dataclasses
import json
from pathlib import Path

import pytest

from lark_jax.config import Experiment, experiment_from_mapping
from lark_jax.evaluation.samples import GradedSample, write_sample_table, write_samples
from lark_jax.runtime import environment, pipeline
from lark_jax.runtime.environment import software_of
from lark_jax.runtime.files import write_json
from lark_jax.runtime.pipeline import MANIFEST, Manifest, Outcome, Task
from lark_jax.stages.layout import BASE, Layout
from lark_jax.stages.report import gather

SAMPLES, SEEDS = 3, (4, 9)


def evaluation_task(layout: Layout, name: str, problems_of: dict[str, int], ending: str = "") -> Task:
    """Writes samples as the evaluation does; each text says which sample it is."""

    def run(directory: Path) -> Outcome:
        for benchmark, count in problems_of.items():
            rows = [
                GradedSample(
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
            write_samples(directory, benchmark, rows)
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
        (a.student, a.benchmark, a.problem.problem, a.problem.answer, a.sample.text, a.sample.correct)
        for a in gather(experiment, layout).answers
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
    assert gather(experiment, Layout.of(experiment)).answers == ()


def test_long_texts_are_shortened(experiment: Experiment) -> None:
    layout, long = Layout.of(experiment), " word" * 100_000 + " end"
    Path(experiment.evaluate.benchmarks[1]).write_text(json.dumps([{"problem": "single" + long, "answer": "0"}]))
    pipeline.run_tasks([evaluation_task(layout, BASE, {"many": 5, "single": 1}, ending=long)])
    *_, answer = gather(experiment, layout).answers
    for text, beginning in ((answer.problem.problem, "single word"), (answer.sample.text, "base single 0 4 0 word")):
        assert text.startswith(beginning)
        assert text.endswith(" word end")
        assert "characters left out" in text
        assert len(text) < 5_000


def test_one_version_is_one_row() -> None:
    ran = [(task, {"jax": "0.10.2", "numpy": "2.1"}) for task in ("score", "select/lark_B1", "report")]
    assert list(software_of(ran)) == [("jax", "0.10.2"), ("numpy", "2.1")]


def test_different_versions_are_rows_with_the_stages_or_tasks_that_had_them() -> None:
    ran = [
        ("score/statistics", {"code": "old", "jax": "0.10.2"}),
        ("score", {"code": "old", "jax": "0.10.2"}),
        ("finetune/lark_B1", {"code": "old", "jax": "0.10.2"}),
        ("finetune/lark_B3", {"code": "new", "jax": "0.10.2"}),
        ("report", {"code": "new", "jax": "0.10.2", "vllm": "0.32"}),
    ]
    assert list(software_of(ran)) == [
        ("code in score, finetune/lark_B1", "old"),
        ("code in finetune/lark_B3, report", "new"),
        ("jax", "0.10.2"),
        ("vllm in score, finetune", "none recorded"),
        ("vllm in report", "0.32"),
    ]


def test_the_report_takes_versions_from_manifests(tmp_path: Path) -> None:
    experiment = experiment_from_mapping(
        {
            "workdir": str(tmp_path),
            "student": {"path": "student"},
            "pool": {"path": "pool.jsonl"},
            "evaluate": {"benchmarks": ("own.json",)},
        }
    )
    layout, here = Layout.of(experiment), environment.package_versions()
    earlier = {
        "score/statistics": layout.statistics,
        "export/lark_B3": layout.export(layout.runs[0]),
        "evaluate/benchmarks": layout.evaluation("benchmarks"),
    }
    for name, folder in earlier.items():
        manifest = Manifest(name, "", {}, {}, Outcome({}), {**here, "lark_jax code": "earlier"}, "1 x TPU")
        write_json(folder / MANIFEST, dataclasses.asdict(manifest))
    shown = gather(experiment, layout).versions
    assert shown["lark_jax code in score, export, evaluate"] == "earlier"
    assert shown["lark_jax code in report"] == here["lark_jax code"]
    assert shown["jax"] == here["jax"]
