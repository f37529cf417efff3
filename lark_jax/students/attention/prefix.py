"""Attention of packed rows whose segments all continue one prefix: the prefix's keys and values are shared.

Rows hold short segments, and the prefix has no causal edge, so a block of queries sees few keys. The scores of a few
rows are held at a time, in float32, and the softmax runs over all keys at once. Rows that are too long for this are
computed a few queries at a time: memory grows with time, not with time squared.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lark_jax.students.attention.contract import matmul_precision, scaled, segment_starts, visible_keys

MOST_SCORES = 1 << 24  # held at a time, unless one query has more; float32: 64 MiB
MOST_BLOCKS = 8  # of a row's queries; each is compiled separately, since later ones see more keys
SMALLEST_BLOCK = 128


class SharedKeys(NamedTuple):
    """Keys and values of one layer for n prefixes, padded on the right to s tokens."""

    k_nskd: jax.Array  # rotated
    v_nskd: jax.Array


class RowLayout(NamedTuple):
    """Which prefix each row continues, and its segments."""

    prefix_b: jax.Array  # int32: index of the prefix
    prefix_lengths_b: jax.Array  # int32: number of valid keys of each prefix; may be 0
    segment_ids_bt: jax.Array  # int32: equal ids are one segment, contiguous


def attend_with_prefix(
    q_bthd: jax.Array,
    k_btkd: jax.Array,
    v_btkd: jax.Array,
    shared: SharedKeys,
    layout: RowLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """softmax(scale q k') v: each query sees its row's prefix, itself, and the earlier keys of its segment.

    Args:
      q_bthd, k_btkd, v_btkd, scale, window: as for `dispatch.attend`, of any float dtype. A window counts positions
        from the start of the prefix on.

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

        qkv = take(q_bthd), take(k_btkd), take(v_btkd)
        return _attend(Plan(block, scale, window), *qkv, shared, RowLayout(*map(take, layout)))

    with jax.named_scope("attention_prefix"):
        return jax.lax.map(some_rows, jnp.arange(batch // rows)).reshape(q_bthd.shape)


class Plan(NamedTuple):
    """What is fixed when the program is traced."""

    block: int
    scale: float | None
    window: int | None


def _attend(
    plan: Plan, q_bthd: jax.Array, k_btkd: jax.Array, v_btkd: jax.Array, shared: SharedKeys, layout: RowLayout
) -> jax.Array:
    block, scale, window = plan
    batch, time, num_heads, head_dim = q_bthd.shape
    prefix_size = shared.k_nskd.shape[1]
    num_kv_heads = k_btkd.shape[2]
    k_bskd = jnp.concatenate([shared.k_nskd[layout.prefix_b], k_btkd], axis=1)
    v_bskd = jnp.concatenate([shared.v_nskd[layout.prefix_b], v_btkd], axis=1)
    seen_of_prefix = _prefix_mask(layout, prefix_size, window)
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
        """Attention of queries at some positions over the prefix and the row's first `stop` tokens."""
        segments_bt, queries = layout.segment_ids_bt[:, :stop], len(positions)
        own_bts = visible_keys(positions, jnp.arange(stop), segments_bt[:, positions], segments_bt, window)
        seen_bkgts = jnp.concatenate([seen_of_prefix(positions), own_bts], axis=-1)[:, None, None]
        q_btkgd = q_bthd.reshape(batch, queries, num_kv_heads, -1, head_dim)
        # The query heads of one key head are stacked: one matrix product per key head.
        q_bkxd = jnp.einsum("btkgd->bkgtd", q_btkgd).reshape(batch, num_kv_heads, -1, head_dim)
        scores_bkxs = multiply("bkxd,bskd->bkxs", q_bkxd, k_bskd[:, : prefix_size + stop])
        scores_bkgts = scores_bkxs.reshape(batch, num_kv_heads, -1, queries, prefix_size + stop)
        scores_bkgts = jnp.where(seen_bkgts, scaled(scores_bkgts, scale, head_dim), -jnp.inf)
        weights_bkgts = jnp.exp(scores_bkgts - scores_bkgts.max(axis=-1, keepdims=True))
        weights_bkxs = weights_bkgts.reshape(scores_bkxs.shape)
        out_bkxd = multiply("bkxs,bskd->bkxd", weights_bkxs.astype(v_bskd.dtype), v_bskd[:, : prefix_size + stop])
        out_bkxd = (out_bkxd / weights_bkxs.sum(axis=-1, keepdims=True)).astype(q_bthd.dtype)
        out_bkgtd = out_bkxd.reshape(batch, num_kv_heads, -1, queries, head_dim)
        return jnp.einsum("bkgtd->btkgd", out_bkgtd).reshape(batch, queries, num_heads, head_dim)

    return jnp.concatenate([some_queries(start) for start in range(0, time, block)], axis=1)


def _prefix_mask(layout: RowLayout, prefix_size: int, window: int | None) -> Callable[[jax.Array], jax.Array]:
    """Function of positions in the row: which keys of the prefix they see, boolean [batch, positions, prefix_size]."""
    keys_s, segment_ids_bt = jnp.arange(prefix_size), layout.segment_ids_bt
    in_prefix_bs = keys_s[None, :] < layout.prefix_lengths_b[:, None]
    if window is None:
        batch = len(in_prefix_bs)
        return lambda positions: jnp.broadcast_to(in_prefix_bs[:, None, :], (batch, len(positions), prefix_size))
    in_segment_bt = jnp.arange(segment_ids_bt.shape[1])[None, :] - segment_starts(segment_ids_bt)
    first_seen_bt = layout.prefix_lengths_b[:, None] + in_segment_bt - (window - 1)
    return lambda positions: in_prefix_bs[:, None, :] & (keys_s[None, None, :] >= first_seen_bt[:, positions, None])
