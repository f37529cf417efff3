"""Held-out problems, and one trajectory of each to measure the loss on: the same for all methods.

We hold out problems rather than trajectories, since other answers to the same problem would leak what it is about.
Which problems, and which trajectory of each, depends only on the seed and the ids, never on a score. So the loss of
every method is measured on the same tokens, and no method chooses what it is measured on.
"""

import hashlib
from collections.abc import Sequence

from lark_jax.errors import SelectionError
from lark_jax.scoring.table import CandidateScore, ScoreTable
from lark_jax.selection.methods import METHODS
from lark_jax.selection.selector import Choice, select_trajectories


def choose_held_out(scores: ScoreTable | Sequence[CandidateScore], fraction: float, seed: int) -> tuple[Choice, ...]:
    """One uniformly drawn valid trajectory (method "random", B = 1) of each held-out problem, in table order.

    Holds out `fraction` of the problems with a valid candidate, rounded, at least one; returns () for a fraction of 0.
    For the same number of tokens, one trajectory of many problems estimates the loss better than several of few.

    Raises:
      SelectionError: no problem would be left to train on.
    """
    if fraction == 0:
        return ()
    choices = select_trajectories(scores, METHODS["random"], 1, seed).choices
    count = max(1, round(fraction * len(choices)))
    if count >= len(choices):
        raise SelectionError(
            f"config.finetune.held_out_fraction: {fraction} of {len(choices)} problems leaves none to train on; "
            "choose a lower value"
        )
    drawn = sorted(choices, key=lambda choice: _draw(seed, choice.problem_id))[:count]
    problems = {choice.problem_id for choice in drawn}
    return tuple(choice for choice in choices if choice.problem_id in problems)


def _draw(seed: int, problem_id: str) -> bytes:
    return hashlib.sha256(repr(("held out", seed, problem_id)).encode()).digest()
