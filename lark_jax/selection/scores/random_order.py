"""Random selection (Appendix C.2): a draw without replacement."""

import hashlib
from collections.abc import Sequence

import numpy as np

from lark_jax.selection.candidates import Candidates
from lark_jax.selection.scores.score import Score, unchanged


def random_numbers(candidates: Candidates, seed: int) -> tuple[np.ndarray]:
    """One uniform number in [0, 1) per candidate [N, K]; the top B of them are a draw without replacement.

    The number depends on the seed and the candidate's ids alone, so that problems or candidates that join or leave
    the pool change no other draw. Each id is hashed once; a pair of hashes becomes a number by `mixed`.
    """
    present = candidates.rows_nk >= 0
    rows = candidates.rows_nk[present]
    problem, candidate = (
        hashes(seed, name, distinct)[codes[rows]]
        for name in ("problem_id", "candidate_id")
        for codes, distinct in [candidates.table.encoded(name)]
    )
    numbers = np.full(candidates.shape, np.nan)
    numbers[present] = (mixed(problem, candidate) >> np.uint64(11)) / 2.0**53
    return (numbers,)


def hashes(seed: int, name: str, texts: Sequence[str]) -> np.ndarray:
    """64 bits of each text's SHA-256 under a seed and the name of what it is, uint64."""
    start = hashlib.sha256(repr((seed, name)).encode())
    found = np.empty(len(texts), np.uint64)
    for index, text in enumerate(texts):
        digest = start.copy()
        digest.update(text.encode())
        found[index] = int.from_bytes(digest.digest()[:8], "big")
    return found


def mixed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """64 bits of two times 64, uint64, by the finalizer of SplitMix64 (Steele et al., 2014), twice."""
    return _finalized(_finalized(first) + second)


def _finalized(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


RANDOM = Score(random_numbers, unchanged, version=2)
