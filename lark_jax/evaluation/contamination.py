"""How similar evaluation problems are to problems that students train on (Appendix C.5 of the paper).

Two problems are compared by the Jaccard index of their sets of character 8-grams, |A and B| / |A or B|, after
normalisation. Text that all problems of the pool begin or end with (an instruction) is ignored.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lark_jax.evaluation.benchmark_records import Benchmark
from lark_jax.evaluation.ngrams import jaccard_rows, normalize_problem
from lark_jax.pool.records import Trajectory

THRESHOLDS = (0.4, 0.7, 0.85)  # of near matches, as in the paper's Table 2
_FRAME_PROBLEMS = 20  # this many different problems do not share their first or last words by chance
_FRAME_CHARACTERS = 20


@dataclass(frozen=True)
class Overlap:
    """A problem of a benchmark and the most similar problem of the pool (the first of several)."""

    group: str  # the table's row
    problem_id: str
    problem: str
    pool_id: str
    pool_problem: str
    jaccard: float
    num_near: int  # problems of the pool with an index of THRESHOLDS[0] or more


@dataclass(frozen=True)
class AuditRow:
    """How many problems of one benchmark, or of one of its levels, have a match in the pool."""

    group: str
    num_problems: int
    exact: int  # with a Jaccard index of 1
    near: tuple[int, ...]  # with at least each of THRESHOLDS


@dataclass(frozen=True)
class Frame:
    """Whole words that all problems of a pool begin and end with."""

    before: str = ""
    after: str = ""

    def removed_from(self, text: str) -> str:
        return text.removeprefix(self.before).removesuffix(self.after)


@dataclass(frozen=True)
class Audit:
    num_pool_problems: int
    frame: Frame  # removed from every text before the comparison
    overlaps: tuple[Overlap, ...]  # one per problem: by benchmark, level, order in the file

    @property
    def rows(self) -> tuple[AuditRow, ...]:
        """One row per benchmark or level, in the order of `overlaps`."""
        groups: dict[str, list[float]] = {}
        for overlap in self.overlaps:
            groups.setdefault(overlap.group, []).append(overlap.jaccard)
        return tuple(_audit_row(group, np.array(indices)) for group, indices in groups.items())

    @property
    def total(self) -> AuditRow:
        return _audit_row("Total", np.array([overlap.jaccard for overlap in self.overlaps]))


def audit_benchmarks(benchmarks: Sequence[Benchmark], pool_problems: Mapping[str, str]) -> Audit:
    """The nearest pool problem of every evaluation problem.

    Args:
      benchmarks: a benchmark whose problems all have a level is split by level.
      pool_problems: problem id -> text; not empty.
    """
    located = [item for benchmark in benchmarks for item in _grouped(benchmark)]
    pool_ids, pool_texts = list(pool_problems), list(pool_problems.values())
    frame = shared_frame(pool_texts)
    queries, corpus = (
        [normalize_problem(frame.removed_from(text)) for text in texts]
        for texts in ([problem for _, _, problem in located], pool_texts)
    )
    overlaps = []
    for (group, problem_id, problem), jaccard_c in zip(located, jaccard_rows(queries, corpus), strict=True):
        nearest = int(jaccard_c.argmax())
        overlaps.append(
            Overlap(
                group=group,
                problem_id=problem_id,
                problem=problem,
                pool_id=pool_ids[nearest],
                pool_problem=pool_texts[nearest],
                jaccard=float(jaccard_c[nearest]),
                num_near=int((jaccard_c >= THRESHOLDS[0]).sum()),
            )
        )
    return Audit(len(pool_texts), frame, tuple(overlaps))


def pool_problems(by_problem: Mapping[str, Sequence[Trajectory]]) -> dict[str, str]:
    """Problem id -> the user turns of its prompt, from `Pool.by_problem()`."""
    return {
        problem_id: "\n\n".join(message.content for message in trajectories[0].prompt if message.role == "user")
        for problem_id, trajectories in by_problem.items()
    }


def shared_frame(texts: Sequence[str]) -> Frame:
    """The words that all texts begin or end with; empty for fewer than 20 different texts or 20 characters."""
    distinct = set(texts)
    if len(distinct) < _FRAME_PROBLEMS:
        return Frame()
    start = _common_start(distinct)
    end = _common_start({text[::-1] for text in distinct})[::-1]
    # "?\nReason ..." and ".\nReason ..." differ in a character of the problem; the frame starts at white space.
    before = start[: max((index + 1 for index, mark in enumerate(start) if mark.isspace()), default=0)]
    after = end[next((index for index, mark in enumerate(end) if mark.isspace()), len(end)) :]
    return Frame(*(part if len(part) >= _FRAME_CHARACTERS else "" for part in (before, after)))


def _common_start(texts: Collection[str]) -> str:
    """Common to all texts: it suffices to compare the first and the last in alphabetical order."""
    pairs = zip(min(texts), max(texts), strict=False)
    return "".join(mark for mark, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _grouped(benchmark: Benchmark) -> Iterator[tuple[str, str, str]]:
    """(group, id, text) of every problem; grouped by level if all have one."""
    if any(problem.level is None for problem in benchmark.problems):
        yield from ((benchmark.name, problem.problem_id, problem.problem) for problem in benchmark.problems)
        return
    for problem in sorted(benchmark.problems, key=lambda problem: str(problem.level)):
        yield f"{benchmark.name}-L{problem.level}", problem.problem_id, problem.problem


def _audit_row(group: str, jaccard: np.ndarray) -> AuditRow:
    near = tuple(int((jaccard >= threshold).sum()) for threshold in THRESHOLDS)
    return AuditRow(group, len(jaccard), int((jaccard == 1.0).sum()), near)
