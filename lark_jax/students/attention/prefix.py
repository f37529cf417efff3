"""Attention of packed rows whose segments all continue one prefix: the prefix's keys and values are shared.

Rows hold short segments, and the prefix has no causal edge, so a block of queries sees few keys: the scores of a few
rows are held at a time, in float32, and the softmax is taken over all keys at once. Of a row that is too long for that,
few queries are taken at a time: memory grows with time, not with time squared.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lark_jax.students.attention.dense import visible_keys
from lark_jax.students.attention.dispatch import matmul_precision

MOST_SCORES = 1 << 24  # held at a time, unless one query has more; float32: 64 MiB
MOST_BLOCKS = 8  # of a row's queries; each is compiled for itself, since later ones see more keys
SMALLEST_BLOCK = 128


class SharedKeys(NamedTuple):
    """Keys and values of one layer for n prefixes, padded on the right to s tokens."""

    k_nskd: jax.Array  # rotated
    v_nskd: jax.Array


class RowLayout(NamedTuple):
    """What each row continues, and where its segments lie."""

    prefix_b: jax.Array  # int32: which prefix
    prefix_lengths_b: jax.Array  # int32: how many of its keys count; may be 0
    segment_ids_bt: jax.Array  # int32: equal ids are one segment, contiguous


def attend_with_prefix(
    q_bthd: jax.Array, k_btkd: jax.Array, v_btkd: jax.Array, shared: SharedKeys, layout: RowLayout
) -> jax.Array:
    """softmax(q k' / sqrt(head_dim)) v: each query sees its row's prefix, itself, and what its segment has before it.

    Args:
      q_bthd, k_btkd, v_btkd: as for `attention.attend`, of any float dtype.

    Returns:
      [batch, time, num_heads, head_dim] in the dtype of `q_bthd`; scores and softmax are fp32.
    """
    batch, time, num_heads, _ = q_bthd.shape
    block = max(SMALLEST_BLOCK, math.ceil(time / MOST_BLOCKS))
    scores_of_row = num_heads * min(block, time) * (time + shared.k_nskd.shape[1])
    rows = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * scores_of_row <= MOST_SCORES))

    def some_rows(index: jax.Array) -> jax.Array:
        def take(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, index * rows, rows)

        return _attend(block, take(q_bthd), take(k_btkd), take(v_btkd), shared, RowLayout(*map(take, layout)))

    with jax.named_scope("attention_prefix"):
        return jax.lax.map(some_rows, jnp.arange(batch // rows)).reshape(q_bthd.shape)


def _attend(
    block: int, q_bthd: jax.Array, k_btkd: jax.Array, v_btkd: jax.Array, shared: SharedKeys, layout: RowLayout
) -> jax.Array:
    batch, time, num_heads, head_dim = q_bthd.shape
    prefix_size = shared.k_nskd.shape[1]
    num_kv_heads = k_btkd.shape[2]
    k_bskd = jnp.concatenate([shared.k_nskd[layout.prefix_b], k_btkd], axis=1)
    v_bskd = jnp.concatenate([shared.v_nskd[layout.prefix_b], v_btkd], axis=1)
    in_prefix_bs = jnp.arange(prefix_size)[None, :] < layout.prefix_lengths_b[:, None]
    multiply = functools.partial(
        jnp.einsum, precision=matmul_precision(q_bthd.dtype), preferred_element_type=jnp.float32
    )

    def some_queries(start: int) -> jax.Array:
        stop = min(start + block, time)
        pieces = math.ceil(batch * num_heads * (stop - start) * (prefix_size + stop) / MOST_SCORES)
        if pieces == 1:
            return attended(jnp.arange(start, stop), q_bthd[:, start:stop], stop)
        size = math.ceil((stop - start) / pieces)

        def piece(index: jax.Array) -> jax.Array:
            positions = jnp.minimum(start + index * size + jnp.arange(size), stop - 1)  # the last query fills up
            return attended(positions, q_bthd[:, positions], stop)

        out_nbqhd = jax.lax.map(piece, jnp.arange(math.ceil((stop - start) / size)))
        return jnp.einsum("nbqhd->bnqhd", out_nbqhd).reshape(batch, -1, num_heads, head_dim)[:, : stop - start]

    def attended(positions: jax.Array, q_bthd: jax.Array, stop: int) -> jax.Array:
        """What queries at some positions see of the prefix and of the row's first `stop` tokens."""
        segments_bt, queries = layout.segment_ids_bt[:, :stop], len(positions)
        own_bts = visible_keys(positions, jnp.arange(stop), segments_bt[:, positions], segments_bt)
        prefix_bts = jnp.broadcast_to(in_prefix_bs[:, None, :], (batch, queries, prefix_size))
        seen_bkgts = jnp.concatenate([prefix_bts, own_bts], axis=-1)[:, None, None]
        q_btkgd = q_bthd.reshape(batch, queries, num_kv_heads, -1, head_dim)
        # Query heads of one key head lie under each other: one matrix product per key head.
        q_bkxd = jnp.einsum("btkgd->bkgtd", q_btkgd).reshape(batch, num_kv_heads, -1, head_dim)
        scores_bkxs = multiply("bkxd,bskd->bkxs", q_bkxd, k_bskd[:, : prefix_size + stop])
        scores_bkgts = scores_bkxs.reshape(batch, num_kv_heads, -1, queries, prefix_size + stop)
        scores_bkgts = jnp.where(seen_bkgts, scores_bkgts / math.sqrt(head_dim), -jnp.inf)
        weights_bkgts = jnp.exp(scores_bkgts - scores_bkgts.max(axis=-1, keepdims=True))
        weights_bkxs = weights_bkgts.reshape(scores_bkxs.shape)
        out_bkxd = multiply("bkxs,bskd->bkxd", weights_bkxs.astype(v_bskd.dtype), v_bskd[:, : prefix_size + stop])
        out_bkxd = (out_bkxd / weights_bkxs.sum(axis=-1, keepdims=True)).astype(q_bthd.dtype)
        out_bkgtd = out_bkxd.reshape(batch, num_kv_heads, -1, queries, head_dim)
        return jnp.einsum("bkgtd->btkgd", out_bkgtd).reshape(batch, queries, num_heads, head_dim)

    return jnp.concatenate([some_queries(start) for start in range(0, time, block)], axis=1)
