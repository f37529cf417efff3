"""Causal attention in blocks, forward and backward: memory grows with time, not with time squared.

The algorithm of FlashAttention-2 (Dao, 2023) in plain jnp: running maximum and sum in fp32 over blocks of keys; the
backward pass recomputes each block's weights from the saved log-sum-exp. Blocks that no query sees are skipped: those
above the diagonal, those of other segments in packed rows, those before the window. A trajectory in a packed row
therefore costs what it costs in a row of its own. Blocks below the diagonal are masked only where rows are packed or a
window is given.

The query heads that share a key head are stacked: a block of queries is a matrix of x = group x time rows, and each
product is one plain matrix product per key head. On a CPU this is twice as fast as five-dimensional products.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.lax import Precision

from lark_jax.students.attention.contract import (
    Backend,
    Options,
    matmul_precision,
    pad_time,
    scale_factor,
    segment_starts,
    visible_keys,
)
from lark_jax.students.remat import ATTENTION, named

LARGEST_BLOCK = 256  # queries, and keys, per block; on a CPU 1.6 times as fast as 512, whose scores leave the cache
BLOCK_MULTIPLE = 16
LOWEST = float(jnp.finfo(jnp.float32).min)  # where a running maximum starts; -inf - -inf would be NaN

State = TypeVar("State")
Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array]


class Plan(NamedTuple):
    """What is fixed when the program is traced."""

    block: int
    scale: float
    window: int | None
    precision: Precision


class SoftmaxState(NamedTuple):
    """Running results of a query block after some key blocks; all fp32."""

    maximum_bkx: jax.Array  # of q k', before scaling
    total_bkx: jax.Array  # sum of the weights exp(scale (q k' - maximum))
    values_bkxd: jax.Array  # sum of weight * value


def blockwise_attention(q_bthd: jax.Array, k_bskd: jax.Array, v_bskd: jax.Array, options: Options) -> jax.Array:
    """See `dispatch.attend`. Any length; the last block is padded."""
    segment_ids, scale, window = options
    batch, time, num_heads, head_dim = q_bthd.shape
    num_kv_heads = k_bskd.shape[2]
    q_btkgd = q_bthd.reshape(batch, time, num_kv_heads, num_heads // num_kv_heads, head_dim)
    plan = Plan(_block_size(time), scale_factor(scale, head_dim), window, matmul_precision(q_bthd.dtype))
    q_btkgd, k_bskd, v_bskd = (pad_time(x, plan.block) for x in (q_btkgd, k_bskd, v_bskd))
    segment_ids = None if segment_ids is None else pad_time(segment_ids, plan.block)
    out_btkgd = _attention(plan, q_btkgd, k_bskd, v_bskd, segment_ids)
    return out_btkgd[:, :time].reshape(batch, time, num_heads, head_dim)


BLOCKWISE = Backend(blockwise_attention)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    plan: Plan, q_btkgd: jax.Array, k_bskd: jax.Array, v_bskd: jax.Array, segment_ids_bt: jax.Array | None
) -> jax.Array:
    return _forward(plan, q_btkgd, k_bskd, v_bskd, segment_ids_bt)[0]


def _forward(
    plan: Plan, q_btkgd: jax.Array, k_bskd: jax.Array, v_bskd: jax.Array, segment_ids_bt: jax.Array | None
) -> tuple[jax.Array, Residuals]:
    block, scale, _, precision = plan
    num_groups = q_btkgd.shape[3]
    multiply = _products(precision)
    q_nbkxd = _query_blocks(q_btkgd, block)
    k_nbksd, v_nbksd = _key_blocks(k_bskd, block), _key_blocks(v_bskd, block)
    first_key_blocks, _ = _visible_blocks(plan, q_nbkxd.shape[0], segment_ids_bt)

    def attend_from(query_block: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_bkxd = q_nbkxd[query_block]

        def visit(key_block: jax.Array, state: SoftmaxState) -> SoftmaxState:
            scores_bkxs = multiply("bkxd,bksd->bkxs", q_bkxd, k_nbksd[key_block])
            return _absorb(state, scores_bkxs, v_nbksd[key_block], scale, precision)

        def visit_masked(key_block: jax.Array, state: SoftmaxState) -> SoftmaxState:
            scores_bkxs = multiply("bkxd,bksd->bkxs", q_bkxd, k_nbksd[key_block])
            scores_bkxs = _masked(scores_bkxs, _mask(plan, query_block, key_block, segment_ids_bt))
            return _absorb(state, scores_bkxs, v_nbksd[key_block], scale, precision)

        below_diagonal = visit_masked if _needs_masks(plan, segment_ids_bt) else visit
        state = jax.lax.fori_loop(first_key_blocks[query_block], query_block, below_diagonal, _first_state(q_bkxd))
        state = _visit_one(query_block, visit_masked, state)
        out_bkxd = (state.values_bkxd / state.total_bkx[..., None]).astype(q_btkgd.dtype)
        return out_bkxd, state.maximum_bkx * scale + jnp.log(state.total_bkx)

    out_nbkxd, lse_nbkx = jax.lax.map(attend_from, jnp.arange(q_nbkxd.shape[0]))
    out_btkgd = named(_rows_of_blocks(out_nbkxd, num_groups), ATTENTION)
    lse_nbkx = named(lse_nbkx, ATTENTION)
    return out_btkgd, (q_btkgd, k_bskd, v_bskd, segment_ids_bt, out_btkgd, lse_nbkx)


def _backward(plan: Plan, residuals: Residuals, d_out_btkgd: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_btkgd, k_bskd, v_bskd, segment_ids_bt, out_btkgd, lse_nbkx = residuals
    block, scale, _, precision = plan
    num_groups = q_btkgd.shape[3]
    multiply = _products(precision)
    q_nbkxd, out_nbkxd, d_out_nbkxd = (_query_blocks(x, block) for x in (q_btkgd, out_btkgd, d_out_btkgd))
    k_nbksd, v_nbksd = _key_blocks(k_bskd, block), _key_blocks(v_bskd, block)
    # sum_s dP P = sum_d dO O, per query.
    delta_nbkx = jnp.sum(d_out_nbkxd.astype(jnp.float32) * out_nbkxd.astype(jnp.float32), axis=-1)
    num_blocks = q_nbkxd.shape[0]
    _, last_query_blocks = _visible_blocks(plan, num_blocks, segment_ids_bt)
    Carry = tuple[jax.Array, jax.Array, jax.Array]

    def one_key_block(d_q_nbkxd: jax.Array, key_block: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        k_bksd, v_bksd = k_nbksd[key_block], v_nbksd[key_block]

        def add(query_block: jax.Array, scores_bkxs: jax.Array, carry: Carry) -> Carry:
            d_q_nbkxd, d_k_bksd, d_v_bksd = carry
            q_bkxd, d_out_bkxd = q_nbkxd[query_block], d_out_nbkxd[query_block]
            weights_bkxs = jnp.exp(scores_bkxs * scale - lse_nbkx[query_block][..., None])
            d_weights_bkxs = multiply("bkxd,bksd->bkxs", d_out_bkxd, v_bksd)
            d_scores_bkxs = weights_bkxs * (d_weights_bkxs - delta_nbkx[query_block][..., None]) * scale
            d_scores_bkxs = d_scores_bkxs.astype(q_bkxd.dtype)
            d_q_bkxd = multiply("bkxs,bksd->bkxd", d_scores_bkxs, k_bksd)
            d_k_bksd = d_k_bksd + multiply("bkxs,bkxd->bksd", d_scores_bkxs, q_bkxd)
            d_v_bksd = d_v_bksd + multiply("bkxs,bkxd->bksd", weights_bkxs.astype(v_bksd.dtype), d_out_bkxd)
            return d_q_nbkxd.at[query_block].add(d_q_bkxd), d_k_bksd, d_v_bksd

        def visit(query_block: jax.Array, carry: Carry) -> Carry:
            return add(query_block, multiply("bkxd,bksd->bkxs", q_nbkxd[query_block], k_bksd), carry)

        def visit_masked(query_block: jax.Array, carry: Carry) -> Carry:
            scores_bkxs = multiply("bkxd,bksd->bkxs", q_nbkxd[query_block], k_bksd)
            mask_bts = _mask(plan, query_block, key_block, segment_ids_bt)
            return add(query_block, _masked(scores_bkxs, mask_bts), carry)

        zeros = jnp.zeros_like(k_bksd, jnp.float32), jnp.zeros_like(v_bksd, jnp.float32)
        carry = _visit_one(key_block, visit_masked, (d_q_nbkxd, *zeros))
        below_diagonal = visit_masked if _needs_masks(plan, segment_ids_bt) else visit
        carry = jax.lax.fori_loop(key_block + 1, last_query_blocks[key_block] + 1, below_diagonal, carry)
        d_q_nbkxd, d_k_bksd, d_v_bksd = carry
        return d_q_nbkxd, (d_k_bksd.astype(k_bskd.dtype), d_v_bksd.astype(v_bskd.dtype))

    d_q_nbkxd = jnp.zeros_like(q_nbkxd, jnp.float32)
    d_q_nbkxd, (d_k_nbksd, d_v_nbksd) = jax.lax.scan(one_key_block, d_q_nbkxd, jnp.arange(num_blocks))
    d_q_btkgd = _rows_of_blocks(d_q_nbkxd.astype(q_btkgd.dtype), num_groups)
    d_k_bskd, d_v_bskd = (jnp.einsum("nbksd->bnskd", x).reshape(k_bskd.shape) for x in (d_k_nbksd, d_v_nbksd))
    return d_q_btkgd, d_k_bskd, d_v_bskd, None


_attention.defvjp(_forward, _backward)


def _visit_one(index: jax.Array, visit: Callable[[jax.Array, State], State], state: State) -> State:
    """visit(index, state) in its own loop: XLA's CPU backend spreads a loop's body over more threads (1.25x)."""
    return jax.lax.fori_loop(index, index + 1, visit, state)


def _first_state(q_bkxd: jax.Array) -> SoftmaxState:
    zeros_bkxd = jnp.zeros_like(q_bkxd, jnp.float32)
    zeros_bkx = zeros_bkxd[..., 0]
    return SoftmaxState(zeros_bkx + LOWEST, zeros_bkx, zeros_bkxd)


def _absorb(
    state: SoftmaxState, scores_bkxs: jax.Array, v_bksd: jax.Array, scale: float, precision: Precision
) -> SoftmaxState:
    maximum_bkx = jnp.maximum(state.maximum_bkx, scores_bkxs.max(axis=-1))
    shrink_bkx = jnp.exp((state.maximum_bkx - maximum_bkx) * scale)
    weights_bkxs = jnp.exp((scores_bkxs - maximum_bkx[..., None]) * scale)
    total_bkx = state.total_bkx * shrink_bkx + weights_bkxs.sum(axis=-1)
    values_bkxd = _products(precision)("bkxs,bksd->bkxd", weights_bkxs.astype(v_bksd.dtype), v_bksd)
    return SoftmaxState(maximum_bkx, total_bkx, state.values_bkxd * shrink_bkx[..., None] + values_bkxd)


def _products(precision: Precision) -> functools.partial:
    return functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)


def _masked(scores_bkxs: jax.Array, mask_bts: jax.Array) -> jax.Array:
    batch, num_kv_heads, _, num_keys = scores_bkxs.shape
    scores_bkgts = scores_bkxs.reshape(batch, num_kv_heads, -1, *mask_bts.shape[1:])
    return jnp.where(mask_bts[:, None, None], scores_bkgts, -jnp.inf).reshape(batch, num_kv_heads, -1, num_keys)


def _needs_masks(plan: Plan, segment_ids_bt: jax.Array | None) -> bool:
    """Whether blocks below the diagonal may hold keys that their queries do not see."""
    return segment_ids_bt is not None or plan.window is not None


def _mask(plan: Plan, query_block: jax.Array, key_block: jax.Array, segment_ids_bt: jax.Array | None) -> jax.Array:
    """Boolean [batch or 1, queries, keys] of one pair of blocks."""
    block = plan.block
    queries, keys = query_block * block + jnp.arange(block), key_block * block + jnp.arange(block)
    if segment_ids_bt is None:
        return visible_keys(queries, keys, None, None, plan.window)
    of_queries, of_keys = (
        jax.lax.dynamic_slice_in_dim(segment_ids_bt, index * block, block, axis=1) for index in (query_block, key_block)
    )
    return visible_keys(queries, keys, of_queries, of_keys, plan.window)


def _visible_blocks(plan: Plan, num_blocks: int, segment_ids_bt: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """int32 [blocks] each, for any row of the batch: the first block of keys that a block's queries see, and the last
    block of queries that see a block's keys.

    Segments are contiguous, so a block reaches as far as the segment at its edge does.
    """
    block, window = plan.block, plan.window
    first, last = jnp.zeros(num_blocks, jnp.int32), jnp.full(num_blocks, num_blocks - 1, jnp.int32)
    if segment_ids_bt is not None:
        starts_bt, ends_bt = segment_starts(segment_ids_bt), _segment_ends(segment_ids_bt)
        first, last = starts_bt[:, ::block].min(axis=0) // block, ends_bt[:, block - 1 :: block].max(axis=0) // block
    if window is not None:
        edges = block * jnp.arange(num_blocks, dtype=jnp.int32)  # a block's first position
        first = jnp.maximum(first, (edges - (window - 1)) // block)
        last = jnp.minimum(last, (edges + block - 1 + (window - 1)) // block)
    return first, last


def _segment_ends(segment_ids_bt: jax.Array) -> jax.Array:
    """int32 [batch, time]: the index of the last token of each token's segment."""
    index_t = jnp.arange(segment_ids_bt.shape[1], dtype=jnp.int32)[None, :]
    changes_bt = segment_ids_bt[:, 1:] != segment_ids_bt[:, :-1]
    is_last_bt = jnp.pad(changes_bt, ((0, 0), (0, 1)), constant_values=True)
    return jax.lax.cummin(jnp.where(is_last_bt, index_t, index_t.shape[1]), axis=1, reverse=True)


def _block_size(time: int) -> int:
    """The smallest block that needs no more blocks than the largest one would, so that little is padded."""
    num_blocks = math.ceil(time / LARGEST_BLOCK)
    return BLOCK_MULTIPLE * math.ceil(time / (num_blocks * BLOCK_MULTIPLE))


def _query_blocks(x_btkgd: jax.Array, block: int) -> jax.Array:
    """[blocks, batch, kv_heads, group x block, head_dim]."""
    batch, time, num_kv_heads, num_groups, head_dim = x_btkgd.shape
    x_bntkgd = x_btkgd.reshape(batch, time // block, block, num_kv_heads, num_groups, head_dim)
    return jnp.einsum("bntkgd->nbkgtd", x_bntkgd).reshape(-1, batch, num_kv_heads, num_groups * block, head_dim)


def _rows_of_blocks(x_nbkxd: jax.Array, num_groups: int) -> jax.Array:
    """The inverse of `_query_blocks`: [batch, time, kv_heads, group, head_dim]."""
    num_blocks, batch, num_kv_heads, _, head_dim = x_nbkxd.shape
    x_nbkgtd = x_nbkxd.reshape(num_blocks, batch, num_kv_heads, num_groups, -1, head_dim)
    return jnp.einsum("nbkgtd->bntkgd", x_nbkgtd).reshape(batch, -1, num_kv_heads, num_groups, head_dim)


def _key_blocks(x_bskd: jax.Array, block: int) -> jax.Array:
    """[blocks, batch, kv_heads, block, head_dim]."""
    batch, time, num_kv_heads, head_dim = x_bskd.shape
    return jnp.einsum("bnskd->nbksd", x_bskd.reshape(batch, time // block, block, num_kv_heads, head_dim))
