"""Graded samples of finished evaluations -> the answers and the comparison of students that the report shows."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lark_jax.evaluation.benchmark_records import Benchmark
from lark_jax.evaluation.samples import GradedSample, read_samples
from lark_jax.report.comparison import ComparedStudent, Comparison, Key, compare, excerpt
from lark_jax.report.content import ShownAnswer
from lark_jax.stages.tables import Evaluation

PROBLEMS_SHOWN = 2  # per benchmark, with an answer of every student


def shown_answers(benchmarks: Sequence[Benchmark], students: Sequence[Evaluation]) -> Iterator[ShownAnswer]:
    """Every student's first answer to the first problems of each benchmark, problem by problem."""
    for benchmark in benchmarks:
        problems = benchmark.problems[:PROBLEMS_SHOWN]
        answers = {found.label: _first_samples(found.directory, benchmark.name, len(problems)) for found in students}
        for index, problem in enumerate(problems):
            short = replace(problem, problem=excerpt(problem.problem))
            for student, samples in answers.items():
                sample = samples[index]
                yield ShownAnswer(student, benchmark.name, short, replace(sample, text=excerpt(sample.text)))


def _first_samples(directory: Path, benchmark: str, num_problems: int) -> list[GradedSample]:
    """Sample 0 under the first seed for the first problems; reads no further."""
    firsts = (sample for sample in read_samples(directory, benchmark) if sample.sample == 0)
    return list(itertools.islice(firsts, num_problems))


def comparison_of_students(benchmarks: Sequence[Benchmark], students: Sequence[Evaluation]) -> Comparison:
    """Compares every student with every other.

    Samples are read twice, line by line: first the verdicts of all, then the few texts that a page shows. The texts of
    several students would not fit into memory.
    """
    names = [benchmark.name for benchmark in benchmarks]
    directories = {found.directory.name: found.directory for found in students}
    compared = [
        ComparedStudent(found.directory.name, found.label, found.budget, _without_texts(found.directory, names))
        for found in students
    ]
    return compare(compared, benchmarks, lambda name, keys: _texts(directories[name], names, keys))


def _without_texts(directory: Path, benchmarks: Sequence[str]) -> Mapping[Key, tuple[GradedSample, ...]]:
    found: dict[Key, list[GradedSample]] = {}
    for benchmark in benchmarks:
        for sample in read_samples(directory, benchmark):
            found.setdefault((benchmark, sample.problem_id), []).append(replace(sample, text=""))
    return {key: tuple(samples) for key, samples in found.items()}


def _texts(directory: Path, benchmarks: Sequence[str], keys: frozenset[Key]) -> dict[Key, dict[bool, str]]:
    found: dict[Key, dict[bool, str]] = {key: {} for key in keys}
    for benchmark in benchmarks if keys else ():
        for sample in read_samples(directory, benchmark):
            texts = found.get((benchmark, sample.problem_id))
            if texts is not None and sample.correct not in texts:
                texts[sample.correct] = excerpt(sample.text)
    return found
