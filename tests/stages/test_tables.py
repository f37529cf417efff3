"""Tables from working directories: which students, in which order, and the same from the stage and the command."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lark_jax import table_one
from lark_jax.errors import EvaluationError
from lark_jax.evaluation.accuracy import BenchmarkResult, accuracies
from lark_jax.evaluation.benchmarks import Benchmark, BenchmarkProblem
from lark_jax.evaluation.engines import EngineChoice
from lark_jax.evaluation.runner import SUMMARY, StudentResult
from lark_jax.evaluation.samples import SampleRow, write_sample_table
from lark_jax.runtime import pipeline
from lark_jax.runtime.files import write_json
from lark_jax.runtime.pipeline import Outcome, Task
from lark_jax.stages.tables import find_evaluations, in_order, paired_differences, read_students

SEEDS, SAMPLES = (0, 1, 2), 3
NAMES = ("base", "lark_B1", "lark_B3", "random_B1", "random_B3", "g_hat-softmax_B3")


ASKED: dict[str, Any] = {
    "engine": "vllm",
    "decoding": {"samples": SAMPLES, "seeds": SEEDS, "temperature": 0.6, "max_tokens": 32_768},
    "grader": {"grader": "math_verify", "rules": 3},
    "system_prompts": "by_kind",
}


def evaluate(workdir: Path, name: str, correct_spn: np.ndarray, ids: tuple[str, ...], **asked: Any) -> None:
    problems = tuple(BenchmarkProblem(problem, "?", "1", "number") for problem in ids)
    benchmark = Benchmark("amc83", problems, "fingerprint")
    result = BenchmarkResult(
        "amc83", "fingerprint", len(ids), SAMPLES, SEEDS, accuracies(correct_spn), (), 0, 0, 1.0, ()
    )
    rows = [
        SampleRow(problem, seed, sample, "", "1", bool(correct_spn[s, p, sample]), "", "stop", 1)
        for s, seed in enumerate(SEEDS)
        for p, problem in enumerate(ids)
        for sample in range(SAMPLES)
    ]

    def run(directory: Path) -> Outcome:
        write_sample_table(directory, [(benchmark, rows)])
        student = StudentResult(name, EngineChoice("vllm", ""), (result,), "")
        write_json(directory / SUMMARY, dataclasses.asdict(student))
        return Outcome(counts={})

    pipeline.run_tasks([Task(f"evaluate/{name}", workdir / "evaluate" / name, lambda: {**ASKED, **asked}, run)])


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    rng = np.random.default_rng(4)
    ids = tuple(f"p{index}" for index in range(12))
    for name in NAMES:
        evaluate(tmp_path / "small", name, rng.random((len(SEEDS), 12, SAMPLES)) < 0.3, ids)
    (tmp_path / "small" / "evaluate" / "engine").mkdir()
    (tmp_path / "small" / "evaluate" / "rsr_B1").mkdir()  # not finished
    return tmp_path / "small"


def test_finished_students_are_found_in_the_papers_order(workdir: Path) -> None:
    found = find_evaluations(workdir)
    assert [(e.method, e.budget) for e in found] == [
        ("base", None), ("random", 1), ("random", 3), ("lark", 1), ("lark", 3), ("g_hat-softmax", 3),
    ]  # fmt: skip
    assert in_order(found[::-1]) == found


def test_lark_is_compared_with_the_others_of_its_budget(workdir: Path) -> None:
    found = find_evaluations(workdir)
    students = {(s.method, s.budget): s for s in read_students("small", found)}
    rows = paired_differences("small", found)
    assert [(row.student, row.other) for row in rows] == [
        ("lark B=1", "base"), ("lark B=1", "random B=1"),
        ("lark B=3", "base"), ("lark B=3", "random B=3"), ("lark B=3", "g_hat-softmax B=3"),
    ]  # fmt: skip
    one, other = (students["lark", 3].benchmarks[0], students["random", 3].benchmarks[0])
    assert rows[3].difference.mean == pytest.approx(one.accuracy.mean - other.accuracy.mean)


def test_other_problems_are_not_paired(workdir: Path) -> None:
    rng = np.random.default_rng(4)
    evaluate(workdir, "rsr_B1", rng.random((len(SEEDS), 12, SAMPLES)) < 0.3, tuple(f"q{index}" for index in range(12)))
    with pytest.raises(EvaluationError, match="amc83 has other problems than in"):
        paired_differences("small", find_evaluations(workdir))


def test_the_command_joins_runs(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(4)
    evaluate(tmp_path / "other", "lark_B3", rng.random((len(SEEDS), 9, SAMPLES)) < 0.3, tuple("abcdefghi"))
    out = tmp_path / "tables"
    assert table_one.main([str(workdir), f"Qwen-2.5-7B={tmp_path / 'other'}", f"--out={out}"]) == 0
    rows = list(csv.DictReader((out / "table_one.csv").open()))
    assert [(row["Model"], row["Method"]) for row in rows] == [
        ("small", "base"), ("small", "random"), ("small", "lark"), ("small", "g_hat-softmax"), ("Qwen-2.5-7B", "lark"),
    ]  # fmt: skip
    assert rows[-1]["B=1 amc83"] == "–"
    assert {path.name for path in out.iterdir()} == {
        "table_one.md", "table_one.csv", "table_one.tex", "accuracies.csv", "differences.md", "differences.csv",
    }  # fmt: skip
    assert "Qwen-2.5-7B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{empty}"], "no evaluated student in this working directory"),
        (["{small}", "small={small}"], "is already called 'small'; write NAME="),
    ],
)
def test_what_cannot_be_joined_is_named(
    arguments: list[str], message: str, workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [text.format(empty=tmp_path / "empty", small=workdir) for text in arguments]
    assert table_one.main([*paths, f"--out={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "values"),
    [
        ({"engine": "transformers"}, "engine vllm and transformers"),
        ({"decoding": {**ASKED["decoding"], "temperature": 1.5}}, "decoding.temperature 0.6 and 1.5"),
        ({"decoding": {**ASKED["decoding"], "seeds": (0, 1)}}, "decoding.seeds [0, 1, 2] and [0, 1]"),
        ({"grader": {"grader": "paper", "rules": 3}}, "grader.grader math_verify and paper"),
        ({"grader": {"grader": "math_verify"}}, "grader.rules 3 and None"),
        ({"system_prompts": "none"}, "system_prompts by_kind and none"),
    ],
)
@pytest.mark.parametrize("where", ["small", "other"])
def test_students_that_were_asked_differently_are_not_joined(
    where: str, asked: dict[str, Any], values: str, workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one working directory as in two."""
    rng = np.random.default_rng(4)
    correct = rng.random((len(SEEDS), 12, SAMPLES)) < 0.3
    evaluate(tmp_path / where, "rsr_B3", correct, tuple(f"p{index}" for index in range(12)), **asked)
    paths = [str(path) for path in dict.fromkeys((workdir, tmp_path / where))]
    assert table_one.main([*paths, f"--out={tmp_path / 'out'}"]) == 2
    first, other = workdir / "evaluate" / "base", tmp_path / where / "evaluate" / "rsr_B3"
    assert f"{first} and {other} do not compare: {values};" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
