"""Graded samples of finished evaluations -> the report's comparison of students."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lark_jax.evaluation.benchmarks import Benchmark
from lark_jax.evaluation.samples import SampleRow, read_samples
from lark_jax.report.comparison import Comparison, Contestant, Key, Problem, Verdict, compare, excerpt


def comparison_of_students(
    benchmarks: Sequence[Benchmark], students: Sequence[tuple[str, int | None, Path]]
) -> Comparison:
    """Every student with every other.

    Samples are read twice, line by line: first the verdicts of all, then the few texts that a page shows. All texts of
    several students would not fit into memory.

    Args:
      students: label, budget and the folder of the evaluation.
    """
    names = [benchmark.name for benchmark in benchmarks]
    contestants = [
        Contestant(directory.name, label, budget, _verdicts(directory, names)) for label, budget, directory in students
    ]
    directories = {directory.name: directory for _, _, directory in students}
    problems = [problem for benchmark in benchmarks for problem in _problems(benchmark)]
    return compare(contestants, problems, lambda name, keys: _texts(directories[name], names, keys))


def _problems(benchmark: Benchmark) -> list[Problem]:
    return [
        Problem(benchmark.name, problem.problem_id, excerpt(problem.problem), problem.answer, problem.level)
        for problem in benchmark.problems
    ]


def _verdicts(directory: Path, benchmarks: Sequence[str]) -> Mapping[Key, tuple[Verdict, ...]]:
    found: dict[Key, tuple[Verdict, ...]] = {}
    for benchmark in benchmarks:
        for row in read_samples(directory, benchmark):
            key = benchmark, row.problem_id
            found[key] = (*found.get(key, ()), _verdict(row))
    return found


def _verdict(row: SampleRow) -> Verdict:
    return Verdict(row.seed, row.sample, row.extracted, row.correct, row.reason)


def _texts(directory: Path, benchmarks: Sequence[str], keys: frozenset[Key]) -> dict[Key, dict[bool, str]]:
    found: dict[Key, dict[bool, str]] = {key: {} for key in keys}
    for benchmark in benchmarks if keys else ():
        for row in read_samples(directory, benchmark):
            texts = found.get((benchmark, row.problem_id))
            if texts is not None and row.correct not in texts:
                texts[row.correct] = excerpt(row.text)
    return found
