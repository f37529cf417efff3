"""Random selection (Appendix C.2): a draw without replacement."""

import hashlib

import numpy as np

from lark_jax.selection.candidates import Candidates
from lark_jax.selection.scores.score import Score, unchanged


def random_numbers(candidates: Candidates, seed: int) -> tuple[np.ndarray]:
    """One uniform number in [0, 1) per candidate [N, K]; the top B of them are a draw without replacement.

    The number depends on the seed and the candidate's ids alone, so that problems or candidates that join or leave
    the pool change no other draw.
    """
    present = candidates.rows_nk >= 0
    rows = candidates.rows_nk[present]
    problems, names = (candidates.table.texts(column, rows) for column in ("problem_id", "candidate_id"))
    numbers = np.full(candidates.shape, np.nan)
    numbers[present] = [_uniform(seed, problem, name) for problem, name in zip(problems, names, strict=True)]
    return (numbers,)


def _uniform(seed: int, problem_id: str, candidate_id: str) -> float:
    """A number in [0, 1) with 53 random bits."""
    key = repr((seed, problem_id, candidate_id)).encode()
    return (int.from_bytes(hashlib.sha256(key).digest()[:8]) >> 11) / 2**53


RANDOM = Score(random_numbers, unchanged)
