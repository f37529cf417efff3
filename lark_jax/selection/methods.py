"""The registry of selection methods: what scores a candidate, and how the top B share the weight.

To add a score or a weighting, write one function with the signature below and give it a line in `SCORES` or
`WEIGHTINGS`; every pair of them is a method. `METHODS` holds the pairs that the paper names.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lark_jax.config import SelectConfig
from lark_jax.errors import ConfigError
from lark_jax.selection.candidates import Candidates
from lark_jax.selection.learnability import lark_scores
from lark_jax.selection.weighting import chi2_top_b, uniform_top_b

ScoreFunction = Callable[[Candidates, int], jax.Array]  # (candidates, seed) -> [N, K], the higher the better
WeightingFunction = Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]  # see selection.weighting


@dataclass(frozen=True)
class Method:
    name: str
    score: ScoreFunction
    weighting: WeightingFunction


def g_hat(candidates: Candidates, seed: int) -> jax.Array:  # noqa: ARG001 (a score function's signature)
    """LARK's score, Eq. 7."""
    loss, brier = candidates.column("loss"), candidates.column("brier")
    return lark_scores(jnp.asarray(loss), jnp.asarray(brier), jnp.asarray(candidates.valid))


def log_likelihood(candidates: Candidates, seed: int) -> jax.Array:  # noqa: ARG001
    """Mean log-likelihood per target token: global naturalness, GRAPE (Appendix C.2)."""
    return -jnp.asarray(candidates.column("loss"))


def random_order(candidates: Candidates, seed: int) -> jax.Array:
    """One uniform number in [0, 1) per candidate; the top B of them are a draw without replacement (Appendix C.2).

    The number depends on the seed and the candidate's ids alone, so that problems or candidates that join or leave
    the pool change no other draw.
    """
    numbers = np.full(candidates.shape, np.nan)
    for row, problem in enumerate(candidates.problems):
        numbers[row, : len(problem)] = [_uniform(seed, score.problem_id, score.candidate_id) for score in problem]
    return jnp.asarray(numbers)


SCORES: dict[str, ScoreFunction] = {
    "g_hat": g_hat,
    "log_likelihood": log_likelihood,
    "random": random_order,
}

WEIGHTINGS: dict[str, WeightingFunction] = {
    "chi2": chi2_top_b,
    "uniform": uniform_top_b,
}

METHODS: dict[str, Method] = {
    "lark": Method("lark", g_hat, chi2_top_b),
    "random": Method("random", random_order, uniform_top_b),
    "grape": Method("grape", log_likelihood, uniform_top_b),
}


def resolve_methods(select: SelectConfig) -> tuple[Method, ...]:
    """The methods of a configuration: `select.methods`, then the pair `select.score` and `select.weighting`.

    Raises:
      ConfigError: a name is not registered; the message lists those that are.
    """
    for name in select.methods:
        _require_registered("methods", name, METHODS)
    methods = tuple(METHODS[name] for name in select.methods)
    if select.score is None or select.weighting is None:
        return methods
    _require_registered("score", select.score, SCORES)
    _require_registered("weighting", select.weighting, WEIGHTINGS)
    pair = Method(f"{select.score}-{select.weighting}", SCORES[select.score], WEIGHTINGS[select.weighting])
    return (*methods, pair)


def _require_registered(field: str, name: str, registry: dict[str, Method] | dict) -> None:
    if name not in registry:
        known = ", ".join(repr(known_name) for known_name in registry)
        raise ConfigError(f"config.select.{field}: expected one of {known}, got {name!r}")


def _uniform(seed: int, problem_id: str, candidate_id: str) -> float:
    """A number in [0, 1) with 53 random bits."""
    key = repr((seed, problem_id, candidate_id)).encode()
    return (int.from_bytes(hashlib.sha256(key).digest()[:8]) >> 11) / 2**53
