"""Scores of candidates, the higher the better: pure functions of columns of the score table, and their registry.

To add a score, write its function and give it a row in `SCORES`. A score is called as `compute(*columns, valid)` with
arrays [N, K] (N problems, candidates padded to K), and is traced by `jax.jit`. What it returns for candidates that are
not valid is ignored; a value that is not finite keeps a valid candidate from being selected.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lark_jax.scoring.text_rules import COLUMNS
from lark_jax.selection.candidates import Candidates
from lark_jax.selection.learnability import lark_scores, learnability_rate
from lark_jax.selection.random_order import random_numbers

Arrays = tuple[np.ndarray, ...]
RULE_WEIGHTS = {"rule_words": 0.30, "rule_verification": 0.20, "rule_exploration": 0.25, "rule_granularity": 0.25}


@dataclass(frozen=True)
class Score:
    """`read` takes arrays [N, K] from the table, `compute` turns them into scores [N, K]."""

    read: Callable[[Candidates, int], Arrays]  # (candidates, seed)
    compute: Callable[..., jax.Array]
    metric: str | None = None  # the entry of `score.metrics` that it needs
    version: int = 1  # raise it when the same table gives other scores, so that existing selections are made again


def from_columns(compute: Callable[..., jax.Array], *columns: str, metric: str | None = None) -> Score:
    """A score that needs only columns of the table, passed to `compute` in this order."""

    def read(candidates: Candidates, seed: int) -> Arrays:  # noqa: ARG001 (signature of Score.read)
        return tuple(candidates.column(name, metric) for name in columns)

    return Score(read, compute, metric)


def unchanged(values: jax.Array, valid: jax.Array) -> jax.Array:  # noqa: ARG001 (signature of a score)
    """The column itself. NaN, for a candidate without a value, keeps it from being selected."""
    return values


def rho_hat(loss: jax.Array, brier: jax.Array, valid: jax.Array) -> jax.Array:
    """A candidate's own learnability rate (Lemma 1, Section 5.3): sum of Brier scores over sum of cross-entropies."""
    return learnability_rate(jnp.where(valid, loss, 1.0), brier)


def brier_residual(brier: jax.Array, num_target_tokens: jax.Array, valid: jax.Array) -> jax.Array:  # noqa: ARG001
    """sum_t ||pi_t - delta(y_t)||^2 over the target tokens (Section 5.3, Figure 2a).

    A sum, as Section 5.3 prints it, so that it grows with the length; the table has the mean.
    """
    return brier * num_target_tokens


def inverse_loss(loss: jax.Array, valid: jax.Array) -> jax.Array:  # noqa: ARG001
    """1 / mean cross-entropy (Section 5.3, Figure 2a): the order of `log_likelihood` with other margins.

    A loss of 0 gets the largest finite number, so that it ranks first.
    """
    return jnp.minimum(1 / loss, jnp.finfo(loss.dtype).max)


def log_likelihood(loss: jax.Array, valid: jax.Array) -> jax.Array:  # noqa: ARG001
    """Mean log-likelihood per target token: global naturalness, GRAPE (Appendix C.2; Zhang et al., 2025)."""
    return -loss


def minus_rank_surprisal_ratio(mean_clipped_rank: jax.Array, loss: jax.Array, valid: jax.Array) -> jax.Array:  # noqa: ARG001
    """-(sum_t min(rank_t, 100)) / (sum_t surprisal_t) (Appendix C.2; Yang et al., 2026, arXiv 2601.14249).

    RSR is minimized, hence the sign. Both columns are means over the same target tokens, so their ratio is the ratio of
    the sums. A loss of 0 makes the ratio infinite; it gets the lowest finite number, so that it ranks last.
    """
    return jnp.maximum(-mean_clipped_rank / loss, jnp.finfo(loss.dtype).min)


def token_length(num_target_tokens: jax.Array, valid: jax.Array) -> jax.Array:  # noqa: ARG001
    """|a_k| (Appendix C.2): the target tokens that were scored, with the end of the turn, without truncated ones."""
    return num_target_tokens


def rule_quality(*indicators_and_valid: jax.Array) -> jax.Array:
    """0.30 z(words) + 0.20 z(verification) + 0.25 z(exploration) + 0.25 z(granularity) (Appendix C.2, after LIMO).

    The z-scores are over the valid candidates of the problem, with the standard deviation of a whole population (the
    paper leaves this open; the order within a problem does not depend on it). An indicator that is the same for all of
    them counts 0.
    """
    *indicators, valid = indicators_and_valid
    valid = valid & jnp.isfinite(jnp.stack(indicators)).all(axis=0)
    weighted = (RULE_WEIGHTS[name] * z_scores(values, valid) for name, values in zip(COLUMNS, indicators, strict=True))
    return jnp.where(valid, sum(weighted, jnp.zeros(valid.shape, indicators[0].dtype)), -jnp.inf)


def z_scores(values: jax.Array, valid: jax.Array) -> jax.Array:
    """(value - mean) / deviation within each row [N, K] over the valid; 0 if they are all equal, and for the others."""
    number = jnp.maximum(valid.sum(axis=-1, keepdims=True), 1)
    mean = jnp.where(valid, values, 0.0).sum(axis=-1, keepdims=True) / number
    centred = jnp.where(valid, values - mean, 0.0)
    deviation = jnp.sqrt(jnp.square(centred).sum(axis=-1, keepdims=True) / number)
    lowest = jnp.where(valid, values, jnp.inf).min(axis=-1, keepdims=True, initial=jnp.inf)
    highest = jnp.where(valid, values, -jnp.inf).max(axis=-1, keepdims=True, initial=-jnp.inf)
    # Not only "deviation > 0": the mean of equal numbers is rounded and may differ from them.
    spread = (highest > lowest) & (deviation > 0)
    return jnp.where(spread, centred / jnp.where(spread, deviation, 1.0), 0.0)


SCORES: dict[str, Score] = {
    "g_hat": from_columns(lark_scores, "loss", "brier"),
    "rho_hat": from_columns(rho_hat, "loss", "brier"),
    "brier": from_columns(brier_residual, "brier", "num_target_tokens"),
    "inverse_loss": from_columns(inverse_loss, "loss"),
    "log_likelihood": from_columns(log_likelihood, "loss"),
    "local_naturalness": from_columns(unchanged, "local_naturalness", metric="local_naturalness"),
    "rank_surprisal": from_columns(minus_rank_surprisal_ratio, "mean_clipped_rank", "loss"),
    "rule_quality": from_columns(rule_quality, *COLUMNS, metric="rule_quality"),
    "judge": from_columns(unchanged, "judge", metric="judge"),
    "token_length": from_columns(token_length, "num_target_tokens"),
    "random": Score(random_numbers, unchanged, version=2),
}
