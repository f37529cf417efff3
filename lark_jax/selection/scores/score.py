"""What a score of candidates is."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from lark_jax.selection.candidates import Candidates

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Score:
    """`read` takes arrays [N, K] from the table, `compute` makes scores [N, K] of them, the higher the better.

    `compute(*arrays, valid)` is pure and traced by `jax.jit`. What it returns for candidates that are not valid is
    ignored; a value that is not finite keeps a valid candidate from being selected.
    """

    read: Callable[[Candidates, int], Arrays]  # (candidates, seed)
    compute: Callable[..., jax.Array]
    metric: str | None = None  # the entry of `score.metrics` that it needs
    version: int = 1  # counts up in a release that computes other scores from the same table, so that these run again


def from_columns(compute: Callable[..., jax.Array], *columns: str, metric: str | None = None) -> Score:
    """A score that needs nothing but columns of the table, handed to `compute` in this order."""

    def read(candidates: Candidates, seed: int) -> Arrays:  # noqa: ARG001 (a score's signature)
        return tuple(candidates.column(name, metric) for name in columns)

    return Score(read, compute, metric)


def unchanged(values: jax.Array, valid: jax.Array) -> jax.Array:  # noqa: ARG001 (a score's signature)
    """What was read is the score. NaN, where there is none, keeps a candidate from being selected."""
    return values
