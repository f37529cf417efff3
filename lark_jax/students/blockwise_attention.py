"""Causal attention in blocks, forward and backward: memory grows with time, not with time squared.

The algorithm of FlashAttention-2 (Dao, 2023) in plain jnp: running maximum and sum in fp32 over blocks of keys; the
backward pass recomputes each block's weights from the saved log-sum-exp. Blocks above the diagonal are never visited.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision

from lark_jax.students.dense_attention import visible_keys
from lark_jax.students.remat import ATTENTION, named

LARGEST_BLOCK = 256  # queries, and keys, per block; on a CPU 1.6 times as fast as 512, whose scores leave the cache
BLOCK_MULTIPLE = 16

Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array]


class SoftmaxState(NamedTuple):
    """What a query block knows after some key blocks; all fp32."""

    maximum_bkgt: jax.Array
    total_bkgt: jax.Array  # sum of exp(score - maximum)
    values_bkgtd: jax.Array  # sum of exp(score - maximum) * value


def blockwise_attention(
    q_bthd: jax.Array,
    k_bskd: jax.Array,
    v_bskd: jax.Array,
    segment_ids_bt: jax.Array | None,
    precision: Precision,
) -> jax.Array:
    """See `attention.attend`. Any length; the last block is padded."""
    batch, time, num_heads, head_dim = q_bthd.shape
    num_kv_heads = k_bskd.shape[2]
    q_btkgd = q_bthd.reshape(batch, time, num_kv_heads, num_heads // num_kv_heads, head_dim)
    block = _block_size(time)
    # Padding lies after every real token: real queries never see it.
    q_btkgd, k_bskd, v_bskd = (pad_time(x, block) for x in (q_btkgd, k_bskd, v_bskd))
    segment_ids_bt = None if segment_ids_bt is None else pad_time(segment_ids_bt, block)
    out_btkgd = _attention(block, precision, q_btkgd, k_bskd, v_bskd, segment_ids_bt)
    return out_btkgd[:, :time].reshape(batch, time, num_heads, head_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    block: int,
    precision: Precision,
    q_btkgd: jax.Array,
    k_bskd: jax.Array,
    v_bskd: jax.Array,
    segment_ids_bt: jax.Array | None,
) -> jax.Array:
    return _forward(block, precision, q_btkgd, k_bskd, v_bskd, segment_ids_bt)[0]


def _forward(
    block: int,
    precision: Precision,
    q_btkgd: jax.Array,
    k_bskd: jax.Array,
    v_bskd: jax.Array,
    segment_ids_bt: jax.Array | None,
) -> tuple[jax.Array, Residuals]:
    take = functools.partial(_take_block, block=block)

    def attend_from(query_block: jax.Array) -> tuple[jax.Array, jax.Array]:
        q = take(q_btkgd, query_block)

        def scores_to(key_block: jax.Array) -> jax.Array:
            mask = _mask(block, query_block, key_block, segment_ids_bt)
            return _masked_scores(q, take(k_bskd, key_block), mask, precision)

        def visit(key_block: jax.Array, state: SoftmaxState) -> SoftmaxState:
            return _absorb(state, scores_to(key_block), take(v_bskd, key_block), precision)

        # The diagonal first: every query sees itself, so the running maximum is finite from the start.
        state = _first_state(scores_to(query_block), take(v_bskd, query_block), precision)
        state = jax.lax.fori_loop(0, query_block, visit, state)
        out = (state.values_bkgtd / state.total_bkgt[..., None]).astype(q_btkgd.dtype)
        return jnp.einsum("bkgtd->btkgd", out), state.maximum_bkgt + jnp.log(state.total_bkgt)

    out_nbtkgd, lse_nbkgt = jax.lax.map(attend_from, jnp.arange(q_btkgd.shape[1] // block))
    out_btkgd = named(jnp.moveaxis(out_nbtkgd, 0, 1).reshape(q_btkgd.shape), ATTENTION)
    lse_nbkgt = named(lse_nbkgt, ATTENTION)
    return out_btkgd, (q_btkgd, k_bskd, v_bskd, segment_ids_bt, out_btkgd, lse_nbkgt)


def _backward(
    block: int, precision: Precision, residuals: Residuals, d_out_btkgd: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_btkgd, k_bskd, v_bskd, segment_ids_bt, out_btkgd, lse_nbkgt = residuals
    num_blocks = lse_nbkgt.shape[0]
    scale = 1 / math.sqrt(q_btkgd.shape[-1])
    take = functools.partial(_take_block, block=block)
    contract = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    # sum_s dP P = sum_d dO O, per query.
    delta_bkgt = jnp.einsum("btkgd->bkgt", d_out_btkgd.astype(jnp.float32) * out_btkgd.astype(jnp.float32))
    delta_nbkgt = jnp.moveaxis(delta_bkgt.reshape(*delta_bkgt.shape[:-1], num_blocks, block), -2, 0)

    def one_key_block(d_q_btkgd: jax.Array, key_block: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        k, v = take(k_bskd, key_block), take(v_bskd, key_block)

        def visit(query_block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_q_btkgd, d_k, d_v = carry
            q, d_out = take(q_btkgd, query_block), take(d_out_btkgd, query_block)
            mask = _mask(block, query_block, key_block, segment_ids_bt)
            weights = jnp.exp(_masked_scores(q, k, mask, precision) - lse_nbkgt[query_block][..., None])
            d_weights = contract("btkgd,bskd->bkgts", d_out, v)
            d_scores = (weights * (d_weights - delta_nbkgt[query_block][..., None]) * scale).astype(q.dtype)
            d_v = d_v + contract("bkgts,btkgd->bskd", weights.astype(v.dtype), d_out)
            d_k = d_k + contract("bkgts,btkgd->bskd", d_scores, q)
            d_q = take(d_q_btkgd, query_block) + contract("bkgts,bskd->btkgd", d_scores, k)
            start = query_block * block
            return jax.lax.dynamic_update_slice_in_dim(d_q_btkgd, d_q, start, axis=1), d_k, d_v

        zeros = jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32)
        d_q_btkgd, d_k, d_v = jax.lax.fori_loop(key_block, num_blocks, visit, (d_q_btkgd, *zeros))
        return d_q_btkgd, (d_k.astype(k.dtype), d_v.astype(v.dtype))

    d_q_btkgd = jnp.zeros_like(q_btkgd, jnp.float32)
    d_q_btkgd, (d_k_nbskd, d_v_nbskd) = jax.lax.scan(one_key_block, d_q_btkgd, jnp.arange(num_blocks))
    d_k_bskd, d_v_bskd = (jnp.moveaxis(x, 0, 1).reshape(k_bskd.shape) for x in (d_k_nbskd, d_v_nbskd))
    return d_q_btkgd.astype(q_btkgd.dtype), d_k_bskd, d_v_bskd, None


_attention.defvjp(_forward, _backward)


def _first_state(scores_bkgts: jax.Array, v_bskd: jax.Array, precision: Precision) -> SoftmaxState:
    maximum = scores_bkgts.max(axis=-1)
    weights = jnp.exp(scores_bkgts - maximum[..., None])
    return SoftmaxState(maximum, weights.sum(axis=-1), _weighted_values(weights, v_bskd, precision))


def _absorb(state: SoftmaxState, scores_bkgts: jax.Array, v_bskd: jax.Array, precision: Precision) -> SoftmaxState:
    maximum = jnp.maximum(state.maximum_bkgt, scores_bkgts.max(axis=-1))
    shrink = jnp.exp(state.maximum_bkgt - maximum)
    weights = jnp.exp(scores_bkgts - maximum[..., None])
    values = state.values_bkgtd * shrink[..., None] + _weighted_values(weights, v_bskd, precision)
    return SoftmaxState(maximum, state.total_bkgt * shrink + weights.sum(axis=-1), values)


def _weighted_values(weights_bkgts: jax.Array, v_bskd: jax.Array, precision: Precision) -> jax.Array:
    weights_bkgts = weights_bkgts.astype(v_bskd.dtype)
    return jnp.einsum(
        "bkgts,bskd->bkgtd", weights_bkgts, v_bskd, precision=precision, preferred_element_type=jnp.float32
    )


def _masked_scores(q_btkgd: jax.Array, k_bskd: jax.Array, mask_bts: jax.Array, precision: Precision) -> jax.Array:
    scores_bkgts = jnp.einsum(
        "btkgd,bskd->bkgts", q_btkgd, k_bskd, precision=precision, preferred_element_type=jnp.float32
    )
    return jnp.where(mask_bts[:, None, None], scores_bkgts / math.sqrt(q_btkgd.shape[-1]), -jnp.inf)


def _mask(block: int, query_block: jax.Array, key_block: jax.Array, segment_ids_bt: jax.Array | None) -> jax.Array:
    """Boolean [batch or 1, queries, keys] of one pair of blocks."""
    queries, keys = query_block * block + jnp.arange(block), key_block * block + jnp.arange(block)
    if segment_ids_bt is None:
        return visible_keys(queries, keys, None, None)
    segments_of = functools.partial(_take_block, segment_ids_bt, block=block)
    return visible_keys(queries, keys, segments_of(query_block), segments_of(key_block))


def _block_size(time: int) -> int:
    """The smallest block that needs no more blocks than the largest one would; little is padded."""
    num_blocks = math.ceil(time / LARGEST_BLOCK)
    return BLOCK_MULTIPLE * math.ceil(time / (num_blocks * BLOCK_MULTIPLE))


def _take_block(x: jax.Array, index: jax.Array, block: int) -> jax.Array:
    """Block `index` along the time axis, which is the second."""
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=1)


def pad_time(x: jax.Array, multiple: int) -> jax.Array:
    """Zeros after the time axis, which is the second, up to a multiple of `multiple`."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % multiple)
    return jnp.pad(x, padding)
