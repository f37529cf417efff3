"""Causal attention by JAX's Pallas kernel for NVIDIA GPUs ("mha", Triton), forward and backward: for packed rows.

Blocks above the diagonal are not visited; blocks of other segments are, under a mask. Scores and softmax are fp32.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha
from jax.lax import Precision

from lark_jax.students.attention.blockwise import pad_time

HEAD_DIMS = (16, 32, 64, 128)  # the kernel works on powers of two, and Triton multiplies matrices from 16 on
BLOCK_SIZES = BlockSizes.get_default()


def triton_refusal(dtype: jnp.dtype, head_dim: int, packed: bool) -> str | None:
    """Why this kernel cannot compute this attention; None: it can."""
    del packed  # segment ids are honoured
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, not {dtype}"
    return None if head_dim in HEAD_DIMS else f"needs a head_dim of {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"


def triton_attention(
    q_bthd: jax.Array,
    k_bskd: jax.Array,
    v_bskd: jax.Array,
    segment_ids_bt: jax.Array | None,
    precision: Precision,
    *,
    interpret: bool = False,
) -> jax.Array:
    """See `attention.attend`. Any length; the last block is padded. Keys are repeated for the queries that share them.

    Args:
      interpret: run the kernel's program as plain JAX, on any platform and in any dtype (tests; slow).
    """
    del precision  # bfloat16 and float16 have one
    time, head_dim = q_bthd.shape[1], q_bthd.shape[3]
    block = max(BLOCK_SIZES.block_q, BLOCK_SIZES.block_k)
    # Padding lies after every real token: real queries never see it.
    q_bthd, k_bskd, v_bskd = (pad_time(x, block) for x in (q_bthd, k_bskd, v_bskd))
    segment_ids_bt = None if segment_ids_bt is None else pad_time(segment_ids_bt, block)
    k_bshd, v_bshd = (jnp.repeat(x, q_bthd.shape[2] // x.shape[2], axis=2) for x in (k_bskd, v_bskd))
    out_bthd: jax.Array = mha(
        q_bthd,
        k_bshd,
        v_bshd,
        segment_ids_bt,
        sm_scale=1 / math.sqrt(head_dim),
        causal=True,
        block_sizes=BLOCK_SIZES,
        interpret=interpret,
    )
    return out_bthd[:, :time]
