"""Causal grouped-query attention behind one function, with a registry of backends."""

from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.lax import Precision

from lark_jax.students.blockwise_attention import blockwise_attention
from lark_jax.students.dense_attention import dense_attention

# Measured on a CPU (4 heads of 32, forward and backward): about equal here, dense 2x slower at 512, 6x at 2,048.
LONGEST_DENSE_ROW = 256


class Backend(Protocol):
    def __call__(
        self,
        q_bthd: jax.Array,
        k_bskd: jax.Array,
        v_bskd: jax.Array,
        segment_ids_bt: jax.Array | None,
        precision: Precision,
    ) -> jax.Array: ...


BACKENDS: Mapping[str, Backend] = {"dense": dense_attention, "blockwise": blockwise_attention}


def attend(
    q_bthd: jax.Array,
    k_bskd: jax.Array,
    v_bskd: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """softmax(q k' / sqrt(head_dim)) v over the keys that each query may see.

    Args:
      q_bthd: [batch, time, num_heads, head_dim]; query head h reads key head h // (num_heads / num_kv_heads).
      k_bskd: [batch, time, num_kv_heads, head_dim].
      v_bskd: as `k_bskd`.
      segment_ids: int [batch, time]; tokens of different segments do not see each other. None: one segment a row.
      backend: a key of `BACKENDS`; None: `default_backend(time)`.

    Returns:
      [batch, time, num_heads, head_dim] in the dtype of `q_bthd`; scores and softmax are fp32.

    Raises:
      ValueError: unknown backend.
    """
    backend = default_backend(q_bthd.shape[1]) if backend is None else backend
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; known: {', '.join(BACKENDS)}")
    with jax.named_scope(f"attention_{backend}"):
        return BACKENDS[backend](q_bthd, k_bskd, v_bskd, segment_ids, matmul_precision(q_bthd.dtype))


def default_backend(length: int) -> str:
    """For rows of `length` tokens."""
    return "dense" if length <= LONGEST_DENSE_ROW else "blockwise"


def matmul_precision(dtype: jnp.dtype) -> Precision:
    """fp32 inputs are multiplied as fp32 on every platform (GPUs would take TF32, TPUs bfloat16)."""
    return Precision.HIGHEST if dtype == jnp.float32 else Precision.DEFAULT
