"""Statistics of each target token, in one pass over vocabulary chunks and without ever holding all logits.

`reference_statistics`, at the end, computes the same from all logits in float64, by other formulas: tests and
`scripts/compare_with_torch.py` measure the op against it. A new per-token field needs both.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lark_jax.ops.vocab_chunks import (
    DEFAULT_VOCAB_CHUNK,
    MAX_BLOCK_LOGITS,
    Window,
    check_op_shapes,
    chunk_logits,
    cross_entropy_from_sums,
    num_windows,
    take,
    take_rows,
    window,
)

Values = jax.Array | np.ndarray


class TokenStatistics(NamedTuple):
    """Statistics of a softmax at its gold token y; every field is fp32 [...], or float64 from the reference."""

    cross_entropy: Values  # -log p_y, nats
    brier: Values  # (1 - p_y)^2 + sum of p_v^2 over v != y, in [0, 2]; a term of the paper's Eq. 43
    rank: Values  # 1 + number of v with z_v > z_y
    target_prob: Values  # p_y
    wrong_concentration: Values  # sum of p_v^2 over v != y


class _OtherSums(NamedTuple):
    """Sums over some of the vocabulary without y, relative to the largest logit m among it."""

    max_other: jax.Array  # m, fp32 [..., t]
    sum_exp: jax.Array  # s1 = sum exp(z_v - m), fp32 [..., t]
    sum_exp2: jax.Array  # s2 = sum exp(2 (z_v - m)), fp32 [..., t]
    num_greater: jax.Array  # count of z_v > z_y, fp32 [..., t]: exact below 2^24, and summed faster than integers


@functools.partial(jax.jit, static_argnames=("vocab_chunk", "axis_name"))
def token_statistics(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    vocab_chunk: int | None = None,
    axis_name: str | None = None,
) -> TokenStatistics:
    """Cross-entropy, Brier score, rank, p_y and wrong concentration of each target token.

    At most 64 MiB of logits exist at a time, whatever the number of tokens and the vocabulary. All sums are fp32;
    sums over the wrong tokens leave y out by index, so nothing cancels where p_y is near 1 and ties never outrank y.
    A logit of -inf is a wrong token of probability zero. Any other non-finite logit, a gold logit that is not finite
    (-inf too), and a target outside the vocabulary give NaN in every field.

    Under a mesh, call it inside `shard_map`: token blocks are cut from the arrays as they are seen here.

    Args:
      hidden: [..., d] final hidden states, any float dtype.
      head: [V, d]; with `axis_name`, this device's rows [V / devices, d] in the order of the axis.
      targets: int [...] gold ids, global also when the head is sharded.
      vocab_chunk: rows of the head per pass (default 4,096); need not divide V.
      axis_name: mesh axis of the enclosing `shard_map` over which the vocabulary is sharded; hidden and targets are
        replicated over it, and so is the result.

    Raises:
      ValueError: shapes or dtypes do not fit together.
    """
    check_op_shapes(hidden, head, targets, vocab_chunk)
    num_tokens = targets.size
    if num_tokens == 0:
        return TokenStatistics(*[jnp.zeros(targets.shape, jnp.float32)] * len(TokenStatistics._fields))
    hidden_nd = hidden.reshape(-1, hidden.shape[-1])
    targets_n = targets.reshape(-1).astype(jnp.int32)
    if axis_name is not None:
        targets_n = targets_n - lax.axis_index(axis_name) * head.shape[0]
    chunk = min(vocab_chunk or DEFAULT_VOCAB_CHUNK, head.shape[0])
    block = min(num_tokens, _tokens_per_block(chunk, head.shape[0]))
    num_blocks = num_windows(num_tokens, block)

    def statistics_of_block(index: jax.Array) -> TokenStatistics:
        rows = window(index, block, num_tokens)
        return _block_statistics(take(hidden_nd, rows, 0), head, take(targets_n, rows, 0), chunk, axis_name)

    def joined(blocks: jax.Array) -> jax.Array:
        already_there = num_blocks * block - num_tokens
        return jnp.concatenate([blocks[:-1].reshape(-1), blocks[-1, already_there:]]).reshape(targets.shape)

    return jax.tree.map(joined, lax.map(statistics_of_block, jnp.arange(num_blocks, dtype=jnp.int32)))


def _tokens_per_block(chunk: int, vocab_size: int) -> int:
    """As many tokens as the logits' budget allows; not more than gold rows fit into one chunk (`_gold_logits`)."""
    within_budget = max(1, MAX_BLOCK_LOGITS // chunk)
    return within_budget if chunk == vocab_size else min(chunk, within_budget)


def _block_statistics(
    hidden_td: jax.Array, head_vd: jax.Array, targets_t: jax.Array, chunk: int, axis_name: str | None
) -> TokenStatistics:
    vocab_size = head_vd.shape[0]
    if chunk == vocab_size:
        logits_tv = chunk_logits(hidden_td, head_vd)
        gold_t = _whole_gold(_pick(logits_tv, targets_t), targets_t, vocab_size, axis_name)
        sums = _sums_over_others(logits_tv, window(jnp.int32(0), chunk, vocab_size), targets_t, gold_t)
    else:
        gold_t = _whole_gold(_gold_logits(hidden_td, head_vd, targets_t, chunk), targets_t, vocab_size, axis_name)
        sums = _sums_over_chunks(hidden_td, head_vd, targets_t, gold_t, chunk)
    if axis_name is not None:
        sums = _sums_over_shards(sums, axis_name)
    return _statistics_from_sums(gold_t, sums)


def _gold_logits(hidden_td: jax.Array, head_vd: jax.Array, targets_t: jax.Array, chunk: int) -> jax.Array:
    """Logits of the gold tokens, equal to the last bit to those that the chunks will show.

    Rows of real heads repeat (reserved tokens that were never trained), and a twin of y must not outrank it because
    its dot product was summed in another order. So the gathered rows form one more chunk of the same shape, of which
    the diagonal is kept.
    """
    num_tokens = targets_t.shape[0]
    rows_c = jnp.zeros_like(targets_t, shape=(chunk,)).at[:num_tokens].set(targets_t)
    return _pick(chunk_logits(hidden_td, take_rows(head_vd, rows_c)), jnp.arange(num_tokens, dtype=jnp.int32))


def _pick(logits_tc: jax.Array, columns_t: jax.Array) -> jax.Array:
    """logits_tc[t, columns_t[t]], without a gather; zero where the column does not exist."""
    ids_c = jnp.arange(logits_tc.shape[1], dtype=jnp.int32)
    return jnp.sum(jnp.where(ids_c[None, :] == columns_t[:, None], logits_tc, 0.0), axis=-1)


def _whole_gold(gold_t: jax.Array, targets_t: jax.Array, vocab_size: int, axis_name: str | None) -> jax.Array:
    """The gold logit from the shard that has it; NaN where none has."""
    is_local_t = (targets_t >= 0) & (targets_t < vocab_size)
    if axis_name is not None:
        gold_t = lax.psum(jnp.where(is_local_t, gold_t, 0.0), axis_name)
        is_local_t = lax.psum(is_local_t.astype(jnp.int32), axis_name) == 1
    return jnp.where(is_local_t, gold_t, jnp.nan)


def _sums_over_chunks(
    hidden_td: jax.Array, head_vd: jax.Array, targets_t: jax.Array, gold_t: jax.Array, chunk: int
) -> _OtherSums:
    vocab_size = head_vd.shape[0]

    def sums_of_chunk(index: jax.Array) -> _OtherSums:
        columns = window(index, chunk, vocab_size)
        return _sums_over_others(chunk_logits(hidden_td, take(head_vd, columns, 0)), columns, targets_t, gold_t)

    chunks = lax.map(sums_of_chunk, jnp.arange(num_windows(vocab_size, chunk), dtype=jnp.int32))
    max_t = jnp.max(chunks.max_other, axis=0)
    chunks = _relative_to(max_t[None, :], chunks)
    return _OtherSums(max_t, *(jnp.sum(values, axis=0) for values in chunks[1:]))


def _sums_over_others(logits_tc: jax.Array, columns: Window, targets_t: jax.Array, gold_t: jax.Array) -> _OtherSums:
    is_other_tc = columns.fresh[None, :] & (columns.ids[None, :] != targets_t[:, None])
    logits_tc = jnp.where(is_other_tc, logits_tc, -jnp.inf)
    # The lower bound is finite because -inf - -inf, in a chunk that holds nothing but y, would be NaN.
    max_t = jnp.maximum(jnp.max(logits_tc, axis=-1), jnp.finfo(jnp.float32).min)
    exp_tc = jnp.exp(logits_tc - max_t[:, None])
    return _OtherSums(
        max_other=max_t,
        sum_exp=jnp.sum(exp_tc, axis=-1),
        sum_exp2=jnp.sum(exp_tc**2, axis=-1),
        num_greater=_count(logits_tc > gold_t[:, None]),
    )


def _count(is_true_tc: jax.Array) -> jax.Array:
    """How many along the last axis, fp32.

    XLA's CPU backend adds up booleans that it has just computed ten times slower than bytes that lie in memory.
    """

    def from_memory(is_true_tc: jax.Array) -> jax.Array:
        return jnp.sum(lax.optimization_barrier(is_true_tc.astype(jnp.int8)), axis=-1, dtype=jnp.float32)

    def as_computed(is_true_tc: jax.Array) -> jax.Array:
        return jnp.sum(is_true_tc, axis=-1, dtype=jnp.float32)

    return lax.platform_dependent(is_true_tc, cpu=from_memory, default=as_computed)


def _sums_over_shards(sums: _OtherSums, axis_name: str) -> _OtherSums:
    max_t = lax.pmax(sums.max_other, axis_name)
    sums = _relative_to(max_t, sums)
    return _OtherSums(max_t, *(lax.psum(values, axis_name) for values in sums[1:]))


def _relative_to(max_other: jax.Array, sums: _OtherSums) -> _OtherSums:
    rescale = jnp.exp(sums.max_other - max_other)
    return _OtherSums(max_other, sums.sum_exp * rescale, sums.sum_exp2 * rescale**2, sums.num_greater)


def _statistics_from_sums(gold_t: jax.Array, sums: _OtherSums) -> TokenStatistics:
    top_t = jnp.maximum(gold_t, sums.max_other)
    others = _relative_to(top_t, sums)
    gold_exp_t = jnp.exp(gold_t - top_t)
    total_t = others.sum_exp + gold_exp_t
    wrong_concentration_t = others.sum_exp2 / total_t**2
    statistics = TokenStatistics(
        cross_entropy=cross_entropy_from_sums(gold_t, sums.max_other, sums.sum_exp),
        brier=(others.sum_exp / total_t) ** 2 + wrong_concentration_t,
        rank=1.0 + sums.num_greater,
        target_prob=gold_exp_t / total_t,
        wrong_concentration=wrong_concentration_t,
    )
    is_valid_t = jnp.isfinite(gold_t) & jnp.isfinite(total_t)
    return jax.tree.map(lambda values_t: jnp.where(is_valid_t, values_t, jnp.nan), statistics)


def reference_statistics(logits: np.ndarray, targets: np.ndarray) -> TokenStatistics:
    """Statistics of logits [..., V] (taken as exact, V >= 2, finite) for gold ids [...], in float64.

    With x = logsumexp of the wrong logits minus the gold logit, cross-entropy = softplus(x), 1 - p_y = sigmoid(x), and
    p_v = sigmoid(x) * (softmax over the wrong tokens)_v.
    """
    logits = np.asarray(logits, np.float64)
    gold_index = np.asarray(targets)[..., None]
    gold = np.take_along_axis(logits, gold_index, -1)[..., 0]
    others = logits.copy()
    np.put_along_axis(others, gold_index, -np.inf, -1)

    others_max = others.max(-1)
    others_exp = np.exp(others - others_max[..., None])
    others_sum = others_exp.sum(-1)
    log_odds_wrong = others_max + np.log(others_sum) - gold
    cross_entropy = np.logaddexp(0.0, log_odds_wrong)
    wrong = np.exp(-np.logaddexp(0.0, -log_odds_wrong))
    wrong_concentration = np.square(others_exp).sum(-1) * np.square(wrong / others_sum)
    return TokenStatistics(
        cross_entropy=cross_entropy,
        brier=np.square(wrong) + wrong_concentration,
        rank=1.0 + (others > gold[..., None]).sum(-1),
        target_prob=np.exp(-cross_entropy),
        wrong_concentration=wrong_concentration,
    )
