"""The weighted loss of Eq. 1 over a large vocabulary, forward and backward without ever holding all logits.

The forward pass keeps two fp32 numbers per token; the backward pass computes each chunk of logits again. The weights
contain all factors and divisors (q_k, answer length, batch size), so that any split into micro-batches or devices adds
up to the same gradient.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lark_jax.ops.vocab_chunks import (
    MAX_BLOCK_LOGITS,
    Window,
    check_op_shapes,
    chunk_logits,
    contract,
    cross_entropy_from_sums,
    num_windows,
    put,
    take,
    window,
    zeros_beside,
)


def weighted_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    token_weights: jax.Array,
    *,
    vocab_chunk: int,
    axis_name: str | None = None,
) -> jax.Array:
    """Sum over tokens of weight x cross-entropy (nats), fp32 scalar: the paper's Eq. 1, all constants in the weights.

    The derivative with respect to `token_weights` is the cross-entropy. A token of weight zero does not affect the sum,
    even if its own loss is not finite.

    Args:
      hidden: [..., d] final hidden states, any float dtype; the head is cast to it.
      head: [V, d], any float dtype; its gradient has the same dtype.
      targets: int [...].
      token_weights: [...] fp32; zero for prompt and padding.
      vocab_chunk: rows of the head per pass; need not divide V.
      axis_name: see `chunked_cross_entropy`.

    Raises:
      ValueError: shapes or dtypes do not fit together.
    """
    if token_weights.shape != targets.shape:
        raise ValueError(f"token_weights {token_weights.shape}: expected the shape of targets, {targets.shape}")
    token_weights = token_weights.astype(jnp.float32)
    cross_entropy = chunked_cross_entropy(hidden, head, targets, vocab_chunk=vocab_chunk, axis_name=axis_name)
    counts = (token_weights != 0.0) | jnp.isfinite(cross_entropy)
    return jnp.sum(token_weights * jnp.where(counts, cross_entropy, 0.0))


def chunked_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, vocab_chunk: int, axis_name: str | None = None
) -> jax.Array:
    """Cross-entropy (nats) of each token, fp32 [...]; has gradients for `hidden` [..., d] and `head` [V, d].

    The head is cast to the dtype of `hidden`. Gradients are computed from logit gradients in that dtype, accumulated in
    fp32 and returned in the dtype of each operand; that of a float32 head is never rounded. Tokens are cut into blocks
    only along the last axis before d, so rows that are sharded over devices do not move. Inside `shard_map`, `head`
    must vary over the axes that `hidden` varies over. A target outside the vocabulary gives NaN.

    Args:
      axis_name: mesh axis of the enclosing `shard_map` (with `check_vma=False`) over which the vocabulary is split:
        `head` is this device's rows, in the order of the axis; targets are global. Hidden states, targets, the result
        and the gradient of the hidden states, which is summed in fp32, are the same on all its devices.

    Raises:
      ValueError: shapes or dtypes do not fit together.
    """
    check_op_shapes(hidden, head, targets, vocab_chunk)
    if targets.size == 0:
        return jnp.zeros(targets.shape, jnp.float32)
    length = targets.shape[-1] if targets.ndim else 1
    hidden_btd = hidden.reshape(-1, length, hidden.shape[-1])
    targets_bt = targets.reshape(-1, length).astype(jnp.int32)
    if axis_name is not None:
        targets_bt = targets_bt - lax.axis_index(axis_name) * head.shape[0]
    options = _Options(min(vocab_chunk, head.shape[0]), head.dtype, axis_name)
    return _cross_entropy(hidden_btd, head, targets_bt, options).reshape(targets.shape)


class _Options(NamedTuple):
    chunk: int
    head_dtype: jnp.dtype  # of the gradient; the residuals have the cast head
    axis_name: str | None


_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


class _Sums(NamedTuple):
    """Sums over the vocabulary, or a part of it, for each token; fp32."""

    gold: jax.Array  # logit of the gold token y; -inf if another part has it
    max_other: jax.Array  # m, over v != y
    sum_other: jax.Array  # sum over v != y of exp(z_v - m)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cross_entropy(hidden_btd: jax.Array, head_vd: jax.Array, targets_bt: jax.Array, options: _Options) -> jax.Array:
    return _forward(hidden_btd, head_vd, targets_bt, options)[0]


def _forward(
    hidden_btd: jax.Array, head_vd: jax.Array, targets_bt: jax.Array, options: _Options
) -> tuple[jax.Array, _Residuals]:
    head_vd = head_vd.astype(hidden_btd.dtype)
    num_rows, length = targets_bt.shape
    block = _block_length(num_rows, length, options.chunk, head_vd.shape[0])

    def add_block(index: jax.Array, sums: _Sums) -> _Sums:
        tokens = window(index, block, length)
        of_block = _sums_of_block(take(hidden_btd, tokens, 1), head_vd, take(targets_bt, tokens, 1), options.chunk)
        return jax.tree.map(lambda all_bt, new: put(all_bt, new, tokens, 1), sums, of_block)

    zeros_bt = zeros_beside(targets_bt.shape, jnp.float32, hidden_btd, head_vd, targets_bt)
    sums = lax.fori_loop(0, num_windows(length, block), add_block, _Sums(zeros_bt, zeros_bt, zeros_bt))
    if options.axis_name is not None:
        sums = _sums_over_shards(sums, options.axis_name)
    gold_bt = jnp.where(jnp.isfinite(sums.gold), sums.gold, jnp.nan)
    cross_entropy_bt = cross_entropy_from_sums(gold_bt, sums.max_other, sums.sum_other)
    return cross_entropy_bt, (hidden_btd, head_vd, targets_bt, cross_entropy_bt, cross_entropy_bt + gold_bt)


def _sums_over_shards(sums: _Sums, axis_name: str) -> _Sums:
    maximum = lax.pmax(sums.max_other, axis_name)
    total = lax.psum(sums.sum_other * jnp.exp(sums.max_other - maximum), axis_name)
    return _Sums(lax.pmax(sums.gold, axis_name), maximum, total)


def _sums_of_block(hidden_bsd: jax.Array, head_vd: jax.Array, targets_bs: jax.Array, chunk: int) -> _Sums:
    """One pass over the vocabulary; the sum excludes y."""
    vocab_size = head_vd.shape[0]

    def sums_of_chunk(index: jax.Array) -> _Sums:
        columns = window(index, chunk, vocab_size)
        logits_bsc = chunk_logits(hidden_bsd, take(head_vd, columns, 0))
        is_gold_bsc = _is_gold(columns, targets_bs)
        gold_bs = jnp.max(jnp.where(is_gold_bsc, logits_bsc, -jnp.inf), axis=-1)
        other_bsc = jnp.where(columns.fresh[None, None, :] & ~is_gold_bsc, logits_bsc, -jnp.inf)
        # The lower bound is finite because -inf - -inf, in a chunk with no token but y, would be NaN.
        max_bs = jnp.maximum(jnp.max(other_bsc, axis=-1), jnp.finfo(jnp.float32).min)
        return _Sums(gold_bs, max_bs, jnp.sum(jnp.exp(other_bsc - max_bs[..., None]), axis=-1))

    chunks = lax.map(sums_of_chunk, jnp.arange(num_windows(vocab_size, chunk), dtype=jnp.int32))
    max_bs = jnp.max(chunks.max_other, axis=0)
    sum_bs = jnp.sum(chunks.sum_other * jnp.exp(chunks.max_other - max_bs[None]), axis=0)
    return _Sums(jnp.max(chunks.gold, axis=0), max_bs, sum_bs)


def _backward(options: _Options, residuals: _Residuals, cotangent_bt: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """Loops over token blocks within vocabulary chunks: each slice of the head's gradient is written once."""
    hidden_btd, head_vd, targets_bt, cross_entropy_bt, lse_bt = residuals
    chunk, head_dtype, axis_name = options
    (num_rows, length), vocab_size = targets_bt.shape, head_vd.shape[0]
    block = _block_length(num_rows, length, chunk, vocab_size)
    Carry = tuple[jax.Array, jax.Array]

    def add_chunk(chunk_index: jax.Array, carry: Carry) -> Carry:
        d_hidden_btd, d_head_vd = carry
        columns = window(chunk_index, chunk, vocab_size)
        head_cd = take(head_vd, columns, 0)
        # Columns of an earlier chunk must not enter d_hidden twice; their rows of d_head are computed again, and equal.
        fresh_head_cd = jnp.where(columns.fresh[:, None], head_cd, 0)

        def add_block(block_index: jax.Array, carry: Carry) -> Carry:
            d_hidden_btd, d_head_cd = carry
            tokens = window(block_index, block, length)
            hidden_bsd = take(hidden_btd, tokens, 1)
            d_logits_bsc = _logit_gradients(
                chunk_logits(hidden_bsd, head_cd),
                _is_gold(columns, take(targets_bt, tokens, 1)),
                take(cross_entropy_bt, tokens, 1),
                take(lse_bt, tokens, 1),
                jnp.where(tokens.fresh[None, :], take(cotangent_bt, tokens, 1), 0.0),
            ).astype(hidden_btd.dtype)
            d_hidden_bsd = take(d_hidden_btd, tokens, 1) + contract(d_logits_bsc, (2,), fresh_head_cd, (0,))
            d_head_cd = d_head_cd + contract(d_logits_bsc, (0, 1), hidden_bsd, (0, 1))
            return put(d_hidden_btd, d_hidden_bsd, tokens, 1), d_head_cd

        d_head_cd = zeros_beside(head_cd.shape, jnp.float32, *residuals, cotangent_bt)
        d_hidden_btd, d_head_cd = lax.fori_loop(0, num_windows(length, block), add_block, (d_hidden_btd, d_head_cd))
        return d_hidden_btd, put(d_head_vd, d_head_cd.astype(head_dtype), columns, 0)

    d_hidden_btd = zeros_beside(hidden_btd.shape, jnp.float32, *residuals, cotangent_bt)
    d_head_vd = zeros_beside(head_vd.shape, head_dtype, *residuals, cotangent_bt)
    d_hidden_btd, d_head_vd = lax.fori_loop(0, num_windows(vocab_size, chunk), add_chunk, (d_hidden_btd, d_head_vd))
    if axis_name is not None:
        d_hidden_btd = lax.psum(d_hidden_btd, axis_name)
    return d_hidden_btd.astype(hidden_btd.dtype), d_head_vd, None


_cross_entropy.defvjp(_forward, _backward)


def _logit_gradients(
    logits_bsc: jax.Array,
    is_gold_bsc: jax.Array,
    cross_entropy_bs: jax.Array,
    lse_bs: jax.Array,
    cotangent_bs: jax.Array,
) -> jax.Array:
    """cotangent x (p_v - [v = y]), fp32 [b, s, c]; p_y - 1 comes from the cross-entropy, which keeps its digits."""
    prob_bsc = jnp.exp(logits_bsc - lse_bs[..., None])
    minus_wrong_bs = jnp.expm1(-cross_entropy_bs)
    gradient_bsc = cotangent_bs[..., None] * jnp.where(is_gold_bsc, minus_wrong_bs[..., None], prob_bsc)
    return jnp.where(cotangent_bs[..., None] == 0.0, 0.0, gradient_bsc)


def _is_gold(columns: Window, targets_bs: jax.Array) -> jax.Array:
    return columns.ids[None, None, :] == targets_bs[..., None]


def _block_length(num_rows: int, length: int, chunk: int, vocab_size: int) -> int:
    """Tokens of each row per block, such that their logits, and their sums by chunk, stay within the budget."""
    num_tokens = MAX_BLOCK_LOGITS // max(chunk, num_windows(vocab_size, chunk))
    return min(length, max(1, num_tokens // num_rows))
