"""Pairs of students: the problems that one of them solves and the other does not.

Under one seed a student solves a problem if any of its samples is correct, as in Acc@k. "More often" means under more
of the seeds.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lark_jax.evaluation.benchmark_records import Benchmark, BenchmarkProblem
from lark_jax.evaluation.samples import GradedSample

PAIRS_WITH_PAGE = 200
PROBLEMS_SHOWN = 12  # per benchmark and direction, the clearest first
BEGINNING_SHOWN, END_SHOWN = 1_500, 2_500  # characters of a text; the answer is at the end

Key = tuple[str, str]  # of a problem: benchmark and id


@dataclass(frozen=True)
class ComparedStudent:
    """A student's samples on every benchmark; all compared students answered the same problems."""

    name: str  # for file names, unique
    label: str
    budget: int | None  # None for the student before fine-tuning
    samples: Mapping[Key, tuple[GradedSample, ...]]  # ordered by seed and number; the texts may be empty


@dataclass(frozen=True)
class Side:
    """One student's samples for a problem, and the text of one of them."""

    label: str
    samples: tuple[GradedSample, ...]
    shown: GradedSample
    text: str

    @property
    def solved(self) -> int:
        return solved_seeds(self.samples)

    @property
    def by_seed(self) -> dict[int, tuple[GradedSample, ...]]:
        seeds = dict.fromkeys(sample.seed for sample in self.samples)
        return {seed: tuple(sample for sample in self.samples if sample.seed == seed) for seed in seeds}


@dataclass(frozen=True)
class Entry:
    """A problem that the first side solves under more seeds than the second; long texts are shortened."""

    problem: BenchmarkProblem
    sides: tuple[Side, Side]


@dataclass(frozen=True)
class Direction:
    """The problems of a benchmark that `better` solves more often than `worse`."""

    benchmark: str
    better: str
    worse: str
    num_problems: int  # all of them
    entries: tuple[Entry, ...]  # the first few


@dataclass(frozen=True)
class PairPage:
    file_name: str
    labels: tuple[str, str]
    directions: tuple[Direction, ...]  # both, for every benchmark


@dataclass(frozen=True)
class Comparison:
    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]  # problems that the row's student solves more often than the column's
    files: Mapping[tuple[int, int], str]  # (row, column), in either order -> the pair's page
    pages: tuple[PairPage, ...]


Tally = Mapping[Key, tuple[int, int]]  # seeds under which the problem is solved, correct samples
Texts = Mapping[Key, Mapping[bool, str]]  # of the first correct and the first wrong sample
TextsOf = Callable[[str, frozenset[Key]], Texts]  # called with a student's name and the problems that are shown


def compare(students: Sequence[ComparedStudent], benchmarks: Sequence[Benchmark], texts_of: TextsOf) -> Comparison:
    """Compares all pairs of students.

    Pairs with the same budget, and pairs with the base student, get pages first, then others, up to `PAIRS_WITH_PAGE`.
    Texts are requested once per student, for the problems that a page shows.
    """
    problems = {
        (benchmark.name, problem.problem_id): problem for benchmark in benchmarks for problem in benchmark.problems
    }
    tallies = [{key: _tally(student.samples[key]) for key in problems} for student in students]
    places = range(len(students))
    won = {order: _more_often(*(tallies[place] for place in order)) for order in itertools.product(places, repeat=2)}
    pairs = sorted(itertools.combinations(places, 2), key=lambda pair: not _alike(*(students[place] for place in pair)))
    pairs = pairs[:PAIRS_WITH_PAGE]
    orders = [order for pair in pairs for order in (pair, pair[::-1])]
    texts = []
    for place, student in enumerate(students):
        keys = [_clearest(won[order], benchmark.name) for order in orders if place in order for benchmark in benchmarks]
        texts.append(texts_of(student.name, frozenset(itertools.chain(*keys))))

    def direction(benchmark: str, better: int, worse: int) -> Direction:
        entries = tuple(
            Entry(
                replace(problems[key], problem=excerpt(problems[key].problem)),
                (
                    _side(students[better], key, True, texts[better][key]),
                    _side(students[worse], key, False, texts[worse][key]),
                ),
            )
            for key in _clearest(won[better, worse], benchmark)
        )
        count = sum(key[0] == benchmark for key in won[better, worse])
        return Direction(benchmark, students[better].label, students[worse].label, count, entries)

    pages = tuple(
        PairPage(
            file_name=f"{students[first].name}_vs_{students[second].name}.html",
            labels=(students[first].label, students[second].label),
            directions=tuple(
                direction(benchmark.name, *order)
                for benchmark in benchmarks
                for order in ((first, second), (second, first))
            ),
        )
        for first, second in pairs
    )
    counts = tuple(tuple(len(won[row, column]) for column in places) for row in places)
    files = {order: page.file_name for pair, page in zip(pairs, pages, strict=True) for order in (pair, pair[::-1])}
    return Comparison(tuple(student.label for student in students), counts, files, pages)


def solved_seeds(samples: Sequence[GradedSample]) -> int:
    """Seeds under which some sample is correct."""
    return len({sample.seed for sample in samples if sample.correct})


def excerpt(text: str) -> str:
    """Beginning and end of a long text, with the number of characters between them."""
    left_out = len(text) - BEGINNING_SHOWN - END_SHOWN
    if left_out <= 0:
        return text
    return f"{text[:BEGINNING_SHOWN]}\n[... {left_out:,} characters left out ...]\n{text[-END_SHOWN:]}"


def _alike(first: ComparedStudent, second: ComparedStudent) -> bool:
    return first.budget is None or second.budget is None or first.budget == second.budget


def _tally(samples: Sequence[GradedSample]) -> tuple[int, int]:
    return solved_seeds(samples), sum(sample.correct for sample in samples)


def _more_often(better: Tally, worse: Tally) -> list[Key]:
    """Problems that `better` solves under more seeds; largest margin first, by seeds and then by correct samples."""
    margins = {key: (ours[0] - worse[key][0], ours[1] - worse[key][1]) for key, ours in better.items()}
    found = [key for key, (seeds, _) in margins.items() if seeds > 0]
    return sorted(found, key=lambda key: margins[key], reverse=True)


def _clearest(keys: Sequence[Key], benchmark: str) -> list[Key]:
    """The first problems of one benchmark: those that a page shows."""
    return [key for key in keys if key[0] == benchmark][:PROBLEMS_SHOWN]


def _side(student: ComparedStudent, key: Key, correct: bool, texts: Mapping[bool, str]) -> Side:
    """With the first correct sample of the student that solves the problem, and the first wrong one of the other.

    Both exist: the first is correct under some seed, the other is wrong in all samples of some seed.
    """
    samples = student.samples[key]
    shown = next(sample for sample in samples if sample.correct == correct)
    return Side(student.label, samples, shown, texts[correct])
