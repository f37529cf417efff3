"""Causal attention that holds the whole [time, time] score matrix: the reference, and the fastest for short rows."""

import math

import jax
import jax.numpy as jnp
from jax.lax import Precision


def dense_attention(
    q_bthd: jax.Array,
    k_bskd: jax.Array,
    v_bskd: jax.Array,
    segment_ids_bt: jax.Array | None,
    precision: Precision,
) -> jax.Array:
    """See `attention.attend`. Softmax in fp32; memory grows with time squared."""
    batch, time, num_heads, head_dim = q_bthd.shape
    num_kv_heads = k_bskd.shape[2]
    q_btkgd = q_bthd.reshape(batch, time, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", q_btkgd, k_bskd, precision=precision, preferred_element_type=jnp.float32)
    allowed = visible_keys(jnp.arange(time), jnp.arange(time), segment_ids_bt, segment_ids_bt)[:, None, None]
    scores = jnp.where(allowed, scores / math.sqrt(head_dim), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_bskd.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v_bskd, precision=precision, preferred_element_type=jnp.float32)
    return out.reshape(q_bthd.shape).astype(q_bthd.dtype)


def visible_keys(
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
) -> jax.Array:
    """Boolean [batch or 1, queries, keys]: a query sees itself and earlier keys of its own segment."""
    causal = (query_positions[:, None] >= key_positions[None, :])[None]
    if query_segments is None or key_segments is None:
        return causal
    return causal & (query_segments[:, :, None] == key_segments[:, None, :])
