"""Two students beside each other: the problems that one of them solves and the other does not.

Under one seed a student solves a problem when any of its samples is correct, as in Acc@k. "More often" means under more
of the seeds.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

PAIRS_WITH_PAGE = 200
PROBLEMS_SHOWN = 12  # of each benchmark and direction, the clearest first
BEGINNING_SHOWN, END_SHOWN = 1_500, 2_500  # characters of a text; the answer is at the end

Key = tuple[str, str]  # of a problem: benchmark and id


@dataclass(frozen=True)
class Verdict:
    """What was made of one sample."""

    seed: int
    sample: int
    extracted: str | None  # the answer that was graded; None without a box
    correct: bool
    reason: str


@dataclass(frozen=True)
class Contestant:
    """A student and what it did on every benchmark; all contestants were asked the same problems."""

    name: str  # for file names, unique
    label: str
    budget: int | None  # None for the student before fine-tuning
    verdicts: Mapping[Key, tuple[Verdict, ...]]  # of every seed and sample, in this order


@dataclass(frozen=True)
class Problem:
    benchmark: str
    problem_id: str
    text: str
    gold: str
    level: str | None

    @property
    def key(self) -> Key:
        return self.benchmark, self.problem_id


@dataclass(frozen=True)
class Side:
    """One student's samples for a problem, and the text of one of them."""

    label: str
    verdicts: tuple[Verdict, ...]
    shown: Verdict
    text: str

    @property
    def solved(self) -> int:
        return solved_seeds(self.verdicts)

    @property
    def by_seed(self) -> dict[int, tuple[Verdict, ...]]:
        seeds = dict.fromkeys(verdict.seed for verdict in self.verdicts)
        return {seed: tuple(verdict for verdict in self.verdicts if verdict.seed == seed) for seed in seeds}


@dataclass(frozen=True)
class Entry:
    """A problem that the first side solves under more seeds than the second."""

    problem: Problem
    sides: tuple[Side, Side]


@dataclass(frozen=True)
class Direction:
    """The problems of a benchmark that `better` solves more often than `worse`."""

    benchmark: str
    better: str
    worse: str
    num_problems: int  # how many there are
    entries: tuple[Entry, ...]  # the first of them


@dataclass(frozen=True)
class PairPage:
    file_name: str
    labels: tuple[str, str]
    directions: tuple[Direction, ...]  # of every benchmark both


@dataclass(frozen=True)
class Comparison:
    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]  # problems that the row's student solves more often than the column's
    files: Mapping[tuple[int, int], str]  # row and column, either way round -> the pair's page
    pages: tuple[PairPage, ...]


Tally = Mapping[Problem, tuple[int, int]]  # seeds under which it is solved, correct samples
Texts = Mapping[Key, Mapping[bool, str]]  # of the first correct and of the first wrong sample
TextsOf = Callable[[str, frozenset[Key]], Texts]  # a contestant's name and the problems that are shown


@dataclass(frozen=True)
class _Entrant:
    contestant: Contestant
    tally: Tally
    texts: Texts  # for the problems that some page shows


def compare(contestants: Sequence[Contestant], problems: Sequence[Problem], texts_of: TextsOf) -> Comparison:
    """All pairs of students.

    Pages come first for pairs of one budget and for those with the base student, then for others, at most
    `PAIRS_WITH_PAGE`. Texts are asked for once per contestant, for the problems that a page shows.
    """
    tallies = [_tally(contestant, problems) for contestant in contestants]
    counts = tuple(tuple(len(_more_often(row, column)) for column in tallies) for row in tallies)
    pairs = list(itertools.combinations(range(len(contestants)), 2))
    pairs.sort(key=lambda pair: not _alike(contestants[pair[0]], contestants[pair[1]]))
    shown = pairs[:PAIRS_WITH_PAGE]
    keys: list[set[Key]] = [set() for _ in contestants]
    for better, worse in (order for pair in shown for order in (pair, pair[::-1])):
        parts = _by_benchmark(_more_often(tallies[better], tallies[worse])).values()
        found = {problem.key for part in parts for problem in part[:PROBLEMS_SHOWN]}
        keys[better] |= found
        keys[worse] |= found
    entrants = [
        _Entrant(contestant, tally, texts_of(contestant.name, frozenset(of)))
        for contestant, tally, of in zip(contestants, tallies, keys, strict=True)
    ]
    benchmarks = tuple(_by_benchmark(problems))
    pages = tuple(_page(entrants[first], entrants[second], benchmarks) for first, second in shown)
    files = {order: page.file_name for pair, page in zip(shown, pages, strict=True) for order in (pair, pair[::-1])}
    return Comparison(tuple(contestant.label for contestant in contestants), counts, files, pages)


def solved_seeds(verdicts: Sequence[Verdict]) -> int:
    """Seeds under which some sample is correct."""
    return len({verdict.seed for verdict in verdicts if verdict.correct})


def excerpt(text: str) -> str:
    """Beginning and end of a long text, with the number of characters between them."""
    left_out = len(text) - BEGINNING_SHOWN - END_SHOWN
    if left_out <= 0:
        return text
    return f"{text[:BEGINNING_SHOWN]}\n[... {left_out:,} characters left out ...]\n{text[-END_SHOWN:]}"


def _alike(first: Contestant, second: Contestant) -> bool:
    return first.budget is None or second.budget is None or first.budget == second.budget


def _by_benchmark(problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    parts: dict[str, list[Problem]] = {}
    for problem in problems:
        parts.setdefault(problem.benchmark, []).append(problem)
    return parts


def _page(first: _Entrant, second: _Entrant, benchmarks: Sequence[str]) -> PairPage:
    directions = [
        (better, worse, _by_benchmark(_more_often(better.tally, worse.tally)))
        for better, worse in ((first, second), (second, first))
    ]
    return PairPage(
        file_name=f"{first.contestant.name}_vs_{second.contestant.name}.html",
        labels=(first.contestant.label, second.contestant.label),
        directions=tuple(
            _direction(benchmark, better, worse, parts.get(benchmark, []))
            for benchmark in benchmarks
            for better, worse, parts in directions
        ),
    )


def _direction(benchmark: str, better: _Entrant, worse: _Entrant, found: Sequence[Problem]) -> Direction:
    entries = tuple(
        Entry(problem, (_side(better, problem, True), _side(worse, problem, False)))
        for problem in found[:PROBLEMS_SHOWN]
    )
    return Direction(benchmark, better.contestant.label, worse.contestant.label, len(found), entries)


def _tally(contestant: Contestant, problems: Sequence[Problem]) -> Tally:
    verdicts = {problem: contestant.verdicts[problem.key] for problem in problems}
    return {problem: (solved_seeds(of), sum(verdict.correct for verdict in of)) for problem, of in verdicts.items()}


def _more_often(better: Tally, worse: Tally) -> list[Problem]:
    """Problems that `better` solves under more seeds; the clearest first, by seeds and then by correct samples."""
    margins = {problem: (ours[0] - worse[problem][0], ours[1] - worse[problem][1]) for problem, ours in better.items()}
    found = [problem for problem, (seeds, _) in margins.items() if seeds > 0]
    return sorted(found, key=lambda problem: margins[problem], reverse=True)


def _side(student: _Entrant, problem: Problem, correct: bool) -> Side:
    """With the first correct sample of the student that solves the problem, and the first wrong one of the other.

    Both exist: the first is correct under some seed, the other is wrong in all samples of some seed.
    """
    verdicts = student.contestant.verdicts[problem.key]
    shown = next(verdict for verdict in verdicts if verdict.correct == correct)
    return Side(student.contestant.label, verdicts, shown, student.texts[problem.key][correct])
