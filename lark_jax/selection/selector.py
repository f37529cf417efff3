"""From the score table to weighted choices."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lark_jax.errors import SelectionError
from lark_jax.scoring.table import CandidateScore
from lark_jax.selection.candidates import Candidates, group_by_problem, is_valid
from lark_jax.selection.methods import Method
from lark_jax.selection.weighting import chosen, descending_ranks


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


def select_trajectories(scores: Sequence[CandidateScore], method: Method, budget: int, seed: int) -> Selection:
    """Chooses and weights the top `budget` candidates of each problem.

    Computed in float64 on the host: margins between close scores keep their digits, and the same table gives the same
    selection beside any accelerator. Candidates that are not valid (see `candidates.is_valid`), or to which the method
    gives no finite score, never enter a sum nor win. A problem left without candidates gets no choice and is listed in
    the counts.

    Raises:
      SelectionError: no candidate of the table can be selected, or JAX may not use the CPU.
    """
    candidates = group_by_problem(scores)
    if not candidates.valid.any():
        raise SelectionError(_nothing_to_select(scores))
    with _float64_on_host():
        values = method.score(candidates, seed)
        valid = jnp.asarray(candidates.valid) & jnp.isfinite(values)
        weights, tau = method.weighting(values, valid, budget)
        outcome = (values, valid, weights, tau, descending_ranks(values, valid), chosen(values, valid, budget))
        values_nk, valid_nk, weights_nk, tau_n, ranks_nk, chosen_nk = (np.asarray(array) for array in outcome)
    choices = tuple(
        _choice(candidates.problems[row][column], weights_nk[row, column], values_nk[row, column], rank)
        for row, column, rank in _by_rank(chosen_nk, ranks_nk)
    )
    if not choices:
        raise SelectionError(f"method {method.name!r} gives a finite score to none of the {len(scores)} candidates")
    counts = _counts(candidates, valid_nk, tau_n, choices)
    return Selection(method.name, budget, choices, counts)


def method_scores(scores: Sequence[CandidateScore], method: Method, seed: int) -> tuple[float, ...]:
    """The method's score of every row of the table, in table order, NaN where a candidate is not valid (Figure 9)."""
    candidates = group_by_problem(scores)
    with _float64_on_host():
        values = np.asarray(method.score(candidates, seed))
    by_candidate = {
        (score.problem_id, score.candidate_id): float(value)
        for problem, row in zip(candidates.problems, values, strict=True)
        for score, value in zip(problem, row, strict=False)  # the row is padded
    }
    return tuple(
        by_candidate[score.problem_id, score.candidate_id] if is_valid(score) else float("nan") for score in scores
    )


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


def _by_rank(chosen_nk: np.ndarray, ranks_nk: np.ndarray) -> list[tuple[int, int, int]]:
    """(row, column, rank from 1) of the chosen, row by row in order of rank."""
    rows, columns = np.nonzero(chosen_nk)
    return sorted(
        ((int(row), int(column), int(ranks_nk[row, column]) + 1) for row, column in zip(rows, columns, strict=True)),
        key=lambda place: (place[0], place[2]),
    )


def _choice(score: CandidateScore, weight: float, value: float, rank: int) -> Choice:
    return Choice(score.problem_id, score.candidate_id, score.teacher, float(weight), float(value), rank)


def _counts(
    candidates: Candidates, valid_nk: np.ndarray, tau_n: np.ndarray, choices: tuple[Choice, ...]
) -> SelectionCounts:
    num_candidates = sum(len(problem) for problem in candidates.problems)
    has_candidate_n: np.ndarray = np.any(valid_nk, axis=-1)
    empty = tuple(
        problem[0].problem_id for problem, has in zip(candidates.problems, has_candidate_n, strict=True) if not has
    )
    return SelectionCounts(
        problems=len(candidates.problems),
        candidates=num_candidates,
        invalid_candidates=num_candidates - int(valid_nk.sum()),
        problems_without_valid_candidate=empty,
        degenerate_problems=int((has_candidate_n & (tau_n == 0)).sum()),
        chosen=len(choices),
        zero_weight=sum(choice.weight == 0 for choice in choices),
    )


def _nothing_to_select(scores: Sequence[CandidateScore]) -> str:
    if not scores:
        return "the score table has no rows; check that the pool is not empty"
    first = scores[0]
    reason = first.reason or f"loss {first.loss}, Brier {first.brier}, {first.num_target_tokens} target tokens"
    return f"none of the {len(scores)} candidates of the score table can be selected; the first, {first.name}: {reason}"
