"""The comparison of students, read from the files of finished evaluations."""

import random
from pathlib import Path

from lark_jax.evaluation.benchmark_records import Benchmark, BenchmarkProblem
from lark_jax.evaluation.samples import GradedSample, write_samples
from lark_jax.report.comparison import END_SHOWN
from lark_jax.stages.comparison import comparison_of_students
from lark_jax.stages.tables import Evaluation

SEEDS, SAMPLES = (4, 9), 3


def benchmark(name: str, count: int) -> Benchmark:
    problems = (BenchmarkProblem(str(index), f"{name} asks {index}", "7", "number") for index in range(count))
    return Benchmark(name, tuple(problems), "fingerprint")


def leave_samples(folder: Path, asked: Benchmark, rng: random.Random) -> Path:
    rows = []
    for seed in SEEDS:
        for problem in asked.problems:
            for sample in range(SAMPLES):
                correct = rng.random() < 0.3
                text = f"{folder.name} {asked.name} {problem.problem_id} {seed} {sample}" + " and so on" * 2_000
                extracted, reason = ("7", "correct") if correct else (None, "no box")
                rows.append(GradedSample(problem.problem_id, seed, sample, text, extracted, correct, reason, "stop", 1))
    write_samples(folder, asked.name, rows)
    return folder


def test_verdicts_and_texts_are_those_of_the_sample_files(tmp_path: Path) -> None:
    rng = random.Random()
    asked = (benchmark("many", 40), benchmark("few", 3))
    for name in ("base", "lark_B3"):
        for one in asked:
            leave_samples(tmp_path / name, one, rng)
    students = [Evaluation("base", None, tmp_path / "base"), Evaluation("lark", 3, tmp_path / "lark_B3")]
    comparison = comparison_of_students(asked, students)
    assert comparison.labels == ("base", "lark B=3")
    (page,) = comparison.pages
    assert page.file_name == "base_vs_lark_B3.html"
    entries = [(direction, entry) for direction in page.directions for entry in direction.entries]
    assert entries
    for direction, entry in entries:
        assert entry.problem.problem == f"{direction.benchmark} asks {entry.problem.problem_id}"
        for side, correct in zip(entry.sides, (True, False), strict=True):
            name = {"base": "base", "lark B=3": "lark_B3"}[side.label]
            key = f"{name} {direction.benchmark} {entry.problem.problem_id} {side.shown.seed} {side.shown.sample} and"
            assert side.text.startswith(key)
            assert side.text.endswith((" and so on" * 2_000)[-END_SHOWN:])
            assert side.shown.correct is correct
            assert [(sample.seed, sample.sample) for sample in side.samples] == [
                (s, i) for s in SEEDS for i in range(SAMPLES)
            ]
