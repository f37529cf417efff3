"""What a diagnostic reads. What it returns, a `Section`, is defined by the report."""

from collections.abc import Callable
from dataclasses import dataclass

from lark_jax.pool.records import Pool
from lark_jax.scoring import ScoreTable
from lark_jax.selection import Choice


@dataclass(frozen=True)
class FinishedSelection:
    """One method's training set at one budget."""

    method: str
    budget: int
    choices: tuple[Choice, ...]  # those with a positive weight


@dataclass(frozen=True)
class Material:
    """The files of a run that diagnostics read, opened by the report stage."""

    seed: int
    budgets: tuple[int, ...]
    scores: ScoreTable | None  # None before the pool is scored
    selections: tuple[FinishedSelection, ...]
    open_pool: Callable[[], Pool]  # reads the pool when it is first called
