"""The learnability rate rho_hat and the score g_hat (paper, Section 4.2). Pure functions of loss and Brier score."""

import jax
import jax.numpy as jnp


def learnability_rate(loss: jax.Array, brier: jax.Array) -> jax.Array:
    """rho_hat = sum_t Brier_t / sum_t CE_t of one trajectory (Algorithm 1, line 4; Eq. 44).

    Both arguments are means over the same target tokens, so their ratio is the ratio of the sums. Eq. 7 prints the
    sum of Brier scores over the *mean* cross-entropy instead, larger by the trajectory's length |a_k|. Algorithm 1
    and Eq. 44 do not, and only they fit the case study of Appendix D.3: with them the scores g_hat of a problem sum
    to (sum Brier)/(sum CE) < 2, and 33 scores around 0.01 sum to about 0.3.

    Args:
      loss: mean cross-entropy in nats, any shape [..., K], >= 0.
      brier: mean Brier score, same shape, in [0, 2].

    Returns:
      rho_hat, same shape and dtype, in [0, 2). Where the loss is 0 it is 0, the limit for a trajectory that becomes
      certain: a token of probability p has Brier <= 2 (1 - p)^2 and cross-entropy >= 1 - p.
    """
    certain = loss == 0
    return jnp.where(certain, 0.0, brier / jnp.where(certain, 1.0, loss))


def lark_scores(loss: jax.Array, brier: jax.Array, valid: jax.Array) -> jax.Array:
    """g_hat_k = l_k / S (2 rho_hat_k - R / S), S = sum_i l_i, R = sum_i rho_hat_i l_i (Eq. 7; Algorithm 1, line 6).

    The derivative of the anchor-time learnability rate with respect to the weight of candidate k at uniform weights,
    for nearly orthogonal trajectory gradients (Eq. 6, Lemma 8).

    Args:
      loss: mean cross-entropy [N, K]: N problems, candidates padded to K.
      brier: mean Brier score [N, K].
      valid: bool [N, K], False for padding and for candidates that were not scored.

    Returns:
      g_hat [N, K] in the dtype of `loss`, never NaN. Candidates that are not valid, or whose loss or Brier score is not
      finite, do not enter the sums and get -inf, so that they rank last.
    """
    usable = valid & jnp.isfinite(loss) & jnp.isfinite(brier)
    loss = jnp.where(usable, loss, 0.0)
    rho_hat = learnability_rate(loss, jnp.where(usable, brier, 0.0))
    total_loss = loss.sum(axis=-1, keepdims=True)
    loss_share = loss / jnp.where(total_loss == 0, 1.0, total_loss)
    mean_rate = (loss_share * rho_hat).sum(axis=-1, keepdims=True)  # R / S
    return jnp.where(usable, loss_share * (2 * rho_hat - mean_rate), -jnp.inf)
