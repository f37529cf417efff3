"""Softmax weights over the top B (paper, Section 5.3, Figure 2b)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lark_jax.selection.ranking import chosen


@dataclass(frozen=True)
class SoftmaxTopB:
    """q_k = exp(s_k / temperature) / sum_j exp(s_j / temperature) over the top B.

    The temperature is the same for all problems and in the units of the score; the paper names no value. Scores of
    LARK are of the order of 0.01, so that a temperature of 1 gives nearly equal weights.
    """

    temperature: float  # > 0

    def __call__(self, scores: jax.Array, valid: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
        tau = jnp.full(scores.shape[:1], self.temperature, scores.dtype)
        return softmax_of_chosen(scores, chosen(scores, valid, budget), tau), tau


def softmax_of_chosen(scores: jax.Array, is_chosen: jax.Array, temperature: jax.Array) -> jax.Array:
    """exp(s_k / temperature) over the chosen, normalised: [N, K], 0 for the others. temperature [N] > 0."""
    highest = jnp.where(is_chosen, scores, -jnp.inf).max(axis=-1, keepdims=True, initial=-jnp.inf)
    below = jnp.where(is_chosen, scores - jnp.where(is_chosen, highest, 0.0), 0.0)  # <= 0, of the best 0
    powers = jnp.where(is_chosen, jnp.exp(below / temperature[:, None]), 0.0)
    return powers / jnp.maximum(powers.sum(axis=-1, keepdims=True), 1.0)  # the best adds 1, where there is one
