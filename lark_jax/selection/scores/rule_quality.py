"""Rule-based quality (Appendix C.2, LIMO-style): a weighted sum of four z-scored indicators of the text."""

import jax
import jax.numpy as jnp

from lark_jax.scoring.text_rules import COLUMNS
from lark_jax.selection.scores.score import from_columns

WEIGHTS = {"rule_words": 0.30, "rule_verification": 0.20, "rule_exploration": 0.25, "rule_granularity": 0.25}


def rule_quality(*indicators_and_valid: jax.Array) -> jax.Array:
    """0.30 z(words) + 0.20 z(verification) + 0.25 z(exploration) + 0.25 z(granularity).

    The z-scores are over the valid candidates of the problem, with the standard deviation of a whole population (the
    paper does not say which; for the order within a problem it does not matter). An indicator that is the same for all
    of them says nothing, and counts 0.
    """
    *indicators, valid = indicators_and_valid
    valid = valid & jnp.isfinite(jnp.stack(indicators)).all(axis=0)
    weighted = (WEIGHTS[name] * z_scores(values, valid) for name, values in zip(COLUMNS, indicators, strict=True))
    return jnp.where(valid, sum(weighted, jnp.zeros(valid.shape, indicators[0].dtype)), -jnp.inf)


def z_scores(values: jax.Array, valid: jax.Array) -> jax.Array:
    """(value - mean) / deviation within each row [N, K] over the valid; 0 where they are all equal, and for others."""
    number = jnp.maximum(valid.sum(axis=-1, keepdims=True), 1)
    mean = jnp.where(valid, values, 0.0).sum(axis=-1, keepdims=True) / number
    centred = jnp.where(valid, values - mean, 0.0)
    deviation = jnp.sqrt(jnp.square(centred).sum(axis=-1, keepdims=True) / number)
    lowest = jnp.where(valid, values, jnp.inf).min(axis=-1, keepdims=True, initial=jnp.inf)
    highest = jnp.where(valid, values, -jnp.inf).max(axis=-1, keepdims=True, initial=-jnp.inf)
    # Not "deviation > 0": the mean of equal numbers is rounded, and may differ from them.
    spread = (highest > lowest) & (deviation > 0)
    return jnp.where(spread, centred / jnp.where(spread, deviation, 1.0), 0.0)


RULE_QUALITY = from_columns(rule_quality, *COLUMNS, metric="rule_quality")
