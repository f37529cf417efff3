"""The weighted loss of Eq. 1 over a large vocabulary, without ever holding its logits, forward or backward.

The forward pass keeps two fp32 numbers per token; the backward pass computes each chunk of logits again. Weights
carry everything that the caller divides by (q_k, answer length, batch size), so that any split into micro-batches or
devices adds up to the same gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lark_jax.scoring.vocab_chunks import (
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
from lark_jax.sharding import DATA


def weighted_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    token_weights: jax.Array,
    *,
    vocab_chunk: int,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Sum over tokens of weight x cross-entropy (nats), fp32 scalar: the paper's Eq. 1, all constants in the weights.

    The derivative by `token_weights` is the cross-entropy itself. A token of weight zero cannot spoil the sum, even
    where its own loss is not finite.

    Args:
      hidden: [..., d] final hidden states, any float dtype; the head is cast to it.
      head: [V, d] of any float dtype, which its gradient keeps.
      targets: int [...].
      token_weights: [...] fp32; zero for prompt and padding.
      vocab_chunk: rows of the head per pass; need not divide V.
      mesh: with it, the leading axis lies over `data`; each device sums over its own rows, and the head's gradient
        is reduced once instead of once per block of tokens.

    Raises:
      ValueError: shapes or dtypes do not fit together.
    """
    if mesh is None:
        return _weighted_sum(hidden, head, targets, token_weights, vocab_chunk)

    def sum_over_rows(hidden: jax.Array, head: jax.Array, targets: jax.Array, token_weights: jax.Array) -> jax.Array:
        # Its transpose is the one psum of the head's gradient, in the head's own dtype: it is cast only behind this.
        head = lax.pcast(head, DATA, to="varying")
        return lax.psum(_weighted_sum(hidden, head, targets, token_weights, vocab_chunk), DATA)

    rows, whole = PartitionSpec(DATA), PartitionSpec()
    sharded = jax.shard_map(sum_over_rows, mesh=mesh, in_specs=(rows, whole, rows, rows), out_specs=whole)
    return sharded(hidden, head, targets, token_weights)


def _weighted_sum(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, token_weights: jax.Array, vocab_chunk: int
) -> jax.Array:
    if token_weights.shape != targets.shape:
        raise ValueError(f"token_weights {token_weights.shape}: expected the shape of targets, {targets.shape}")
    token_weights = token_weights.astype(jnp.float32)
    cross_entropy = chunked_cross_entropy(hidden, head, targets, vocab_chunk=vocab_chunk)
    counts = (token_weights != 0.0) | jnp.isfinite(cross_entropy)
    return jnp.sum(token_weights * jnp.where(counts, cross_entropy, 0.0))


def chunked_cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array, *, vocab_chunk: int) -> jax.Array:
    """Cross-entropy (nats) of each token, fp32 [...]; differentiable by `hidden` [..., d] and `head` [V, d].

    The head is cast to the dtype of `hidden`. Gradients are formed from logit gradients in that dtype, accumulated in
    fp32 and returned in the dtype of each operand; that of a float32 head is never rounded. Tokens are cut into blocks
    along the last axis before d only, so rows that are sharded over devices stay where they are. Inside `shard_map`,
    `head` has to vary over the axes that `hidden` varies over. A target outside the vocabulary gives NaN.

    Raises:
      ValueError: shapes or dtypes do not fit together.
    """
    check_op_shapes(hidden, head, targets, vocab_chunk)
    if targets.size == 0:
        return jnp.zeros(targets.shape, jnp.float32)
    length = targets.shape[-1] if targets.ndim else 1
    hidden_btd = hidden.reshape(-1, length, hidden.shape[-1])
    targets_bt = targets.reshape(-1, length).astype(jnp.int32)
    chunk = min(vocab_chunk, head.shape[0])
    return _cross_entropy(hidden_btd, head, targets_bt, chunk, head.dtype).reshape(targets.shape)


_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _cross_entropy(
    hidden_btd: jax.Array, head_vd: jax.Array, targets_bt: jax.Array, chunk: int, head_dtype: jnp.dtype
) -> jax.Array:
    return _forward(hidden_btd, head_vd, targets_bt, chunk, head_dtype)[0]


def _forward(
    hidden_btd: jax.Array, head_vd: jax.Array, targets_bt: jax.Array, chunk: int, head_dtype: jnp.dtype
) -> tuple[jax.Array, _Residuals]:
    """The residuals hold the cast head; the backward pass needs `head_dtype` for its gradient."""
    del head_dtype
    head_vd = head_vd.astype(hidden_btd.dtype)
    num_rows, length = targets_bt.shape
    block = _block_length(num_rows, length, chunk, head_vd.shape[0])

    def add_block(index: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens = window(index, block, length)
        block_results = _block_cross_entropy(take(hidden_btd, tokens, 1), head_vd, take(targets_bt, tokens, 1), chunk)
        return jax.tree.map(lambda all_bt, new: put(all_bt, new, tokens, 1), results, block_results)

    zeros_bt = zeros_beside(targets_bt.shape, jnp.float32, hidden_btd, head_vd, targets_bt)
    cross_entropy_bt, lse_bt = lax.fori_loop(0, num_windows(length, block), add_block, (zeros_bt, zeros_bt))
    return cross_entropy_bt, (hidden_btd, head_vd, targets_bt, cross_entropy_bt, lse_bt)


def _block_cross_entropy(
    hidden_bsd: jax.Array, head_vd: jax.Array, targets_bs: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and log-sum-exp, fp32 [b, s], in one pass over the vocabulary; y is kept out of the sum."""
    vocab_size = head_vd.shape[0]

    def sums_of_chunk(index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        columns = window(index, chunk, vocab_size)
        logits_bsc = chunk_logits(hidden_bsd, take(head_vd, columns, 0))
        is_gold_bsc = _is_gold(columns, targets_bs)
        gold_bs = jnp.max(jnp.where(is_gold_bsc, logits_bsc, -jnp.inf), axis=-1)
        other_bsc = jnp.where(columns.fresh[None, None, :] & ~is_gold_bsc, logits_bsc, -jnp.inf)
        # The lower bound is finite because -inf - -inf, in a chunk that holds nothing but y, would be NaN.
        max_bs = jnp.maximum(jnp.max(other_bsc, axis=-1), jnp.finfo(jnp.float32).min)
        return gold_bs, max_bs, jnp.sum(jnp.exp(other_bsc - max_bs[..., None]), axis=-1)

    chunks = lax.map(sums_of_chunk, jnp.arange(num_windows(vocab_size, chunk), dtype=jnp.int32))
    gold_bs, max_bs = jnp.max(chunks[0], axis=0), jnp.max(chunks[1], axis=0)
    sum_bs = jnp.sum(chunks[2] * jnp.exp(chunks[1] - max_bs[None]), axis=0)
    gold_bs = jnp.where(jnp.isfinite(gold_bs), gold_bs, jnp.nan)
    cross_entropy_bs = cross_entropy_from_sums(gold_bs, max_bs, sum_bs)
    return cross_entropy_bs, cross_entropy_bs + gold_bs


def _backward(
    chunk: int, head_dtype: jnp.dtype, residuals: _Residuals, cotangent_bt: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    """Vocabulary chunks outside, token blocks inside: each slice of the head's gradient is written once."""
    hidden_btd, head_vd, targets_bt, cross_entropy_bt, lse_bt = residuals
    (num_rows, length), vocab_size = targets_bt.shape, head_vd.shape[0]
    block = _block_length(num_rows, length, chunk, vocab_size)
    Carry = tuple[jax.Array, jax.Array]

    def add_chunk(chunk_index: jax.Array, carry: Carry) -> Carry:
        d_hidden_btd, d_head_vd = carry
        columns = window(chunk_index, chunk, vocab_size)
        head_cd = take(head_vd, columns, 0)
        # Columns that an earlier chunk had already must not reach d_hidden twice; their rows of d_head come out equal.
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
    return d_hidden_btd.astype(hidden_btd.dtype), d_head_vd, None


_cross_entropy.defvjp(_forward, _backward)


def _logit_gradients(
    logits_bsc: jax.Array,
    is_gold_bsc: jax.Array,
    cross_entropy_bs: jax.Array,
    lse_bs: jax.Array,
    cotangent_bs: jax.Array,
) -> jax.Array:
    """cotangent x (p_v - [v = y]), fp32 [b, s, c]; p_y - 1 comes from the cross-entropy, with all its digits."""
    prob_bsc = jnp.exp(logits_bsc - lse_bs[..., None])
    minus_wrong_bs = jnp.expm1(-cross_entropy_bs)
    gradient_bsc = cotangent_bs[..., None] * jnp.where(is_gold_bsc, minus_wrong_bs[..., None], prob_bsc)
    return jnp.where(cotangent_bs[..., None] == 0.0, 0.0, gradient_bsc)


def _is_gold(columns: Window, targets_bs: jax.Array) -> jax.Array:
    return columns.ids[None, None, :] == targets_bs[..., None]


def _block_length(num_rows: int, length: int, chunk: int, vocab_size: int) -> int:
    """Tokens of every row that are worked on together: their logits, and their sums by chunk, keep to the budget."""
    num_tokens = MAX_BLOCK_LOGITS // max(chunk, num_windows(vocab_size, chunk))
    return min(length, max(1, num_tokens // num_rows))
