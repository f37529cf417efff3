"""The statistics of a trajectory, in one table: the score step, the score table and the documentation follow from it.

To add a statistic, add a row to `STATISTICS`. If no per-token field has the values yet, compute them first, in
`lark_jax.ops.token_statistics`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lark_jax.ops.token_statistics import TokenStatistics

MAX_RANK = 100.0  # r_max of the rank-surprisal ratio, Appendix C.2

Reduction = Callable[[jax.Array, jax.Array], jax.Array]  # (values [rows, length], mask [rows, length]) -> [rows]
TrajectoryMeans = dict[str, jax.Array]  # statistic -> float32 [rows]; JAX returns the keys in alphabetical order


def mean(values_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
    """Mean over the tokens with mask 1.0, NaN for a row without any; masked-out values are never read."""
    return jnp.where(mask_bt > 0, values_bt, 0.0).sum(-1) / mask_bt.sum(-1)


def mean_clipped(values_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
    """Mean of min(value, MAX_RANK)."""
    return mean(jnp.minimum(values_bt, MAX_RANK), mask_bt)


@dataclass(frozen=True)
class Statistic:
    """A column of the score table: a per-token field, reduced over the target tokens of a trajectory."""

    name: str
    field: str  # of `TokenStatistics`
    reduction: Reduction
    meaning: str
    unit: str
    source: str  # where the paper uses it


# The order of the rows is that of the columns.
STATISTICS = (
    Statistic("loss", "cross_entropy", mean, "mean cross-entropy", "nats", "Algorithm 1, line 3"),
    Statistic("brier", "brier", mean, "mean Brier score", "in [0, 2]", "Algorithm 1, line 4; brier / loss is rho_hat"),
    Statistic(
        "mean_clipped_rank", "rank", mean_clipped, "mean of min(rank, 100)", "rank", "C.2; divided by loss it is RSR"
    ),
    Statistic("mean_rank", "rank", mean, "mean rank", "rank", "C.2, RSR without a bound"),
    Statistic("target_prob", "target_prob", mean, "mean probability of the target token", "in [0, 1]", "Figure 4, top"),
    Statistic(
        "wrong_concentration",
        "wrong_concentration",
        mean,
        "mean of the sum of squared probabilities of the other tokens",
        "in [0, 1]",
        "Figure 4, bottom",
    ),
)


def trajectory_means(statistics: TokenStatistics, mask_bt: jax.Array) -> TrajectoryMeans:
    """Reduces every statistic [rows, length] over the tokens with mask 1.0."""
    return {
        statistic.name: statistic.reduction(getattr(statistics, statistic.field), mask_bt) for statistic in STATISTICS
    }


def markdown_table() -> str:
    """`STATISTICS` as docs/methods.md shows them."""
    lines = ["| column | value | unit | in the paper |", "|---|---|---|---|"]
    lines += [f"| `{each.name}` | {each.meaning} | {each.unit} | {each.source} |" for each in STATISTICS]
    return "\n".join(lines)
