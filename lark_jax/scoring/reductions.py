"""From statistics per token to statistics per trajectory."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lark_jax.ops.token_statistics import TokenStatistics

MAX_RANK = 100.0  # r_max of the rank-surprisal ratio, Appendix C.2


class TrajectoryMeans(NamedTuple):
    """Means over the target tokens of each row, float32 [rows]; NaN for a row without target tokens."""

    loss: jax.Array  # length-normalized cross-entropy, nats (Algorithm 1, line 3)
    brier: jax.Array  # mean of ||pi_t - delta(y_t)||^2; brier / loss is rho_hat (Algorithm 1, line 4)
    mean_clipped_rank: jax.Array  # mean of min(rank, 100); divided by loss it is RSR (Appendix C.2)
    mean_rank: jax.Array  # the same without the bound: RSR as r_max goes to infinity
    target_prob: jax.Array  # Figure 4, top
    wrong_concentration: jax.Array  # Figure 4, bottom


def trajectory_means(statistics: TokenStatistics, mask_bt: jax.Array) -> TrajectoryMeans:
    """Averages each statistic [rows, length] over the tokens with mask 1.0; masked-out values are never read."""

    def mean(values_bt: jax.Array) -> jax.Array:
        return jnp.where(mask_bt > 0, values_bt, 0.0).sum(-1) / mask_bt.sum(-1)

    return TrajectoryMeans(
        loss=mean(statistics.cross_entropy),
        brier=mean(statistics.brier),
        mean_clipped_rank=mean(jnp.minimum(statistics.rank, MAX_RANK)),
        mean_rank=mean(statistics.rank),
        target_prob=mean(statistics.target_prob),
        wrong_concentration=mean(statistics.wrong_concentration),
    )
