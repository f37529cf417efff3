"""Turns a weighted selection into an unweighted one, for trainers without weights, by systematic sampling."""

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

from lark_jax.selection.selector import Choice


def resampled_counts(choices: Sequence[Choice], copies: int, seed: int) -> tuple[int, ...]:
    """How often each choice appears when every problem is drawn `copies` times with its weights q_k.

    Systematic ("low-variance") sampling: one number u in [0, 1) per problem, and a choice is drawn for each of
    u, u + 1, ..., u + copies - 1 that falls into its part of [0, copies), which is copies x q_k long. So a problem's
    counts sum to `copies`, each is copies x q_k rounded down or up, and their mean over seeds is copies x q_k. The
    number depends only on the seed and the problem's id. Fractions are exact: if `copies` is a multiple of the number
    of equal weights, the counts are equal under every seed.

    Returns:
      One count >= 0 per choice, in the order of `choices`.
    """
    problems: dict[str, list[int]] = {}
    for index, choice in enumerate(choices):
        problems.setdefault(choice.problem_id, []).append(index)
    counts = [0] * len(choices)
    for problem_id, members in problems.items():
        drawn = _systematic([choices[index].weight for index in members], copies, _uniform(seed, problem_id))
        for index, count in zip(members, drawn, strict=True):
            counts[index] = count
    return tuple(counts)


def _systematic(weights: Sequence[float], copies: int, start: Fraction) -> list[int]:
    """How many of start, start + 1, ... fall into each part [a, b): ceil(b - start) - ceil(a - start)."""
    exact = [Fraction(weight) for weight in weights]
    scale = copies / sum(exact)
    passed = [math.ceil(scale * end - start) for end in accumulate(exact, initial=Fraction(0))]
    return [after - before for before, after in pairwise(passed)]


def _uniform(seed: int, problem_id: str) -> Fraction:
    """A number in [0, 1) with 64 random bits."""
    digest = hashlib.sha256(repr((seed, "resample", problem_id)).encode()).digest()
    return Fraction(int.from_bytes(digest[:8]), 2**64)
