"""Random selection (Appendix C.2): a draw without replacement that depends only on the seed and the ids."""

import hashlib
from collections.abc import Sequence

import numpy as np

from lark_jax.selection.candidates import Candidates


def random_numbers(candidates: Candidates, seed: int) -> tuple[np.ndarray]:
    """One uniform number in [0, 1) per candidate [N, K]; the top B of them are a draw without replacement.

    The number depends only on the seed and the candidate's ids, so problems or candidates that join or leave the pool
    change no other draw. Each id is hashed once; `mixed` turns a pair of hashes into a number.
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
    """64 bits of the SHA-256 of seed, column name and each text, uint64."""
    start = hashlib.sha256(repr((seed, name)).encode())
    found = np.empty(len(texts), np.uint64)
    for index, text in enumerate(texts):
        digest = start.copy()
        digest.update(text.encode())
        found[index] = int.from_bytes(digest.digest()[:8], "big")
    return found


def mixed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mixes two 64-bit hashes into one, uint64, by the finalizer of SplitMix64 (Steele et al., 2014) applied twice."""
    return _finalized(_finalized(first) + second)


def _finalized(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
