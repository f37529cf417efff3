"""From the score table to weighted choices."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from lark_jax.errors import SelectionError
from lark_jax.scoring.table import CandidateScore, ScoreTable
from lark_jax.selection.candidates import Candidates, group_by_problem, valid_rows
from lark_jax.selection.methods import Method
from lark_jax.selection.ranking import descending_ranks, usable
from lark_jax.selection.weightings import Weighting

BLOCK = 8_192  # problems that are computed at once


@dataclass(frozen=True)
class Choice:
    """A candidate among the top B of its problem."""

    problem_id: str
    candidate_id: str
    teacher: str
    weight: float  # q_k: sums to 1 over the choices of a problem; 0 for a tie at the threshold
    score: float  # the method's score, the higher the better
    rank: int  # 1 to B within the problem


@dataclass(frozen=True)
class SelectionCounts:
    """What the manifest says about a selection."""

    problems: int
    candidates: int
    invalid_candidates: int  # skipped, without target tokens, or of non-finite loss, Brier or method score
    problems_without_valid_candidate: tuple[str, ...]
    problems_without_value: tuple[str, ...]  # they have valid candidates, and the method has a finite score for none
    degenerate_problems: int  # the weighting fell back to uniform: no B + 1 candidates, or no positive margin
    chosen: int  # at most B per problem
    zero_weight: int  # among the chosen: tied with rank B + 1, so left out of the training set


@dataclass(frozen=True)
class Selection:
    method: str
    budget: int
    choices: tuple[Choice, ...]  # problems in table order, then by rank
    counts: SelectionCounts

    @property
    def name(self) -> str:
        """Folder and data set name, as `lark_B3`."""
        return f"{self.method}_B{self.budget}"


class Weighed(NamedTuple):
    """All candidates under one method and budget; arrays on the host."""

    scores: np.ndarray  # float64 [N, K], the higher the better
    usable: np.ndarray  # bool [N, K]: valid, and of finite score
    ranks: np.ndarray  # int32 [N, K], 0 is the best
    weights: np.ndarray  # float64 [N, K]
    tau: np.ndarray  # float64 [N], see `selection.weightings`


def select_trajectories(
    scores: ScoreTable | Sequence[CandidateScore], method: Method, budget: int, seed: int
) -> Selection:
    """Chooses and weights the top `budget` candidates of each problem.

    Computed in float64 on the host: margins between close scores keep their digits, and the same table gives the same
    selection beside any accelerator. Candidates that are not valid (see `candidates.valid_rows`), or to which the
    method gives no finite score, never enter a sum nor win. A problem left without candidates gets no choice and is
    listed in the counts.

    Raises:
      SelectionError: no candidate of the table can be selected, the table lacks a metric that the method needs, or
        JAX may not use the CPU.
    """
    candidates = group_by_problem(scores)
    if not candidates.valid.any():
        raise SelectionError(_nothing_to_select(candidates.table))
    weighed = weigh(candidates, method, budget, seed)
    choices = _choices(candidates, weighed, budget)
    if not choices:
        raise SelectionError(_without_value(method, len(scores)))
    return Selection(method.name, budget, choices, _counts(candidates, weighed, choices))


def weigh(candidates: Candidates, method: Method, budget: int, seed: int) -> Weighed:
    """Scores, ranks and weights of all candidates: the selection itself, compiled once per method and shape.

    Raises:
      SelectionError: as `select_trajectories`.
    """
    arrays = (*method.score.read(candidates, seed), candidates.valid)
    with _float64_on_host():
        blocks = [
            [np.asarray(found) for found in _weigh(block, method.score.compute, method.weighting, budget)]
            for block in _blocks(arrays)
        ]
    problems = len(candidates.valid)
    return Weighed(*(np.concatenate(parts)[:problems] for parts in zip(*blocks, strict=True)))


def _blocks(arrays: tuple[np.ndarray, ...]) -> Iterator[tuple[np.ndarray, ...]]:
    """Arrays [N, K] cut along N into blocks of one shape, the last filled up with zeros, which are not valid.

    Problems do not depend on each other. A block's comparisons stay in the processor's caches, so that time grows
    with N and not faster, and one program serves a pool of any size.
    """
    problems = len(arrays[0])
    size = min(problems, BLOCK)
    for first in range(0, problems, size):
        missing = max(first + size - problems, 0)
        yield tuple(np.pad(array[first : first + size], ((0, missing), (0, 0))) for array in arrays)


@functools.partial(jax.jit, static_argnames=("score", "weighting"))
def _weigh(
    arrays: tuple[jax.Array, ...], score: Callable[..., jax.Array], weighting: Weighting, budget: int
) -> tuple[jax.Array, ...]:
    *columns, valid = arrays
    values = score(*columns, valid)
    takes_part = usable(values, valid)
    weights, tau = weighting(values, takes_part, budget)
    return values, takes_part, descending_ranks(values, takes_part), weights, tau


def method_scores(scores: ScoreTable | Sequence[CandidateScore], method: Method, seed: int) -> tuple[float, ...]:
    """The method's score of every row of the table, in table order, NaN where a candidate is not valid (Figure 9).

    Raises:
      SelectionError: the table has no rows, lacks a metric that the method needs, or JAX may not use the CPU.
    """
    candidates = group_by_problem(scores)
    if not len(candidates.table):
        raise SelectionError(_nothing_to_select(candidates.table))
    values_nk = weigh(candidates, method, 1, seed).scores
    by_row = np.full(len(candidates.table), np.nan)
    present = candidates.rows_nk >= 0
    by_row[candidates.rows_nk[present]] = values_nk[present]
    return tuple(np.where(valid_rows(candidates.table), by_row, np.nan).tolist())


@contextmanager
def _float64_on_host() -> Iterator[None]:
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise SelectionError(
            "selection runs on the CPU, which JAX_PLATFORMS leaves out; append ',cpu' to it"
        ) from error
    with jax.enable_x64(True), jax.default_device(host):
        yield


def _choices(candidates: Candidates, weighed: Weighed, budget: int) -> tuple[Choice, ...]:
    """Problems in table order, then by rank."""
    problem, column = np.nonzero(weighed.usable & (weighed.ranks < budget))
    order = np.lexsort((weighed.ranks[problem, column], problem))
    places = problem[order], column[order]
    rows = candidates.rows_nk[places]
    ids = (candidates.table.texts(name, rows) for name in ("problem_id", "candidate_id", "teacher"))
    numbers = (weighed.weights[places], weighed.scores[places], weighed.ranks[places] + 1)
    return tuple(Choice(*values) for values in zip(*ids, *(array.tolist() for array in numbers), strict=True))


def _counts(candidates: Candidates, weighed: Weighed, choices: tuple[Choice, ...]) -> SelectionCounts:
    has_candidate_n: np.ndarray = np.any(weighed.usable, axis=-1)
    is_valid_n: np.ndarray = np.any(candidates.valid, axis=-1)

    def problems(chosen_n: np.ndarray) -> tuple[str, ...]:
        return tuple(candidates.table.texts("problem_id", candidates.rows_nk[chosen_n, 0]))

    return SelectionCounts(
        problems=len(candidates.rows_nk),
        candidates=len(candidates.table),
        invalid_candidates=len(candidates.table) - int(weighed.usable.sum()),
        problems_without_valid_candidate=problems(~is_valid_n),
        problems_without_value=problems(is_valid_n & ~has_candidate_n),
        degenerate_problems=int((has_candidate_n & (weighed.tau == 0)).sum()),
        chosen=len(choices),
        zero_weight=sum(choice.weight == 0 for choice in choices),
    )


def _without_value(method: Method, count: int) -> str:
    message = f"method {method.name!r} gives a finite score to none of the {count} candidates"
    if method.score.metric is None:
        return f"{message}; look at the columns of the score table that it is made of, or take another method"
    return f"{message}; the manifest of metrics/{method.score.metric} says why its metric has no value for them"


def _nothing_to_select(table: ScoreTable) -> str:
    if not len(table):
        return "the score table has no rows; check that the pool is not empty"
    (first,) = ScoreTable(table.table.slice(0, 1)).rows()
    loss, brier = first.statistics["loss"], first.statistics["brier"]
    reason = first.reason or f"loss {loss}, Brier {brier}, {first.num_target_tokens} target tokens"
    return f"none of the {len(table)} candidates of the score table can be selected; the first, {first.name}: {reason}"
