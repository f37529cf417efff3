"""Causal attention by JAX's Pallas kernel for NVIDIA GPUs ("mha", Triton), forward and backward: for packed rows.

The kernel skips blocks above the diagonal. It visits blocks of other segments and masks them. Scores and softmax are
fp32.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

from lark_jax.students.attention.contract import HALF_PRECISION, Backend, Options, pad_time, scale_factor

HEAD_DIMS = (16, 32, 64, 128)  # the kernel works on powers of two, and Triton multiplies matrices from 16 on
BLOCK_SIZES = BlockSizes.get_default()


def triton_attention(
    q_bthd: jax.Array, k_bskd: jax.Array, v_bskd: jax.Array, options: Options, *, interpret: bool = False
) -> jax.Array:
    """See `dispatch.attend`. Any length; the last block is padded. Keys are repeated for the queries that share them.

    Args:
      interpret: run the kernel's program as plain JAX, on any platform and in any dtype (tests; slow).
    """
    segment_ids, scale, _ = options  # no window
    time, num_heads, head_dim = q_bthd.shape[1:]
    block = max(BLOCK_SIZES.block_q, BLOCK_SIZES.block_k)
    q_bthd, k_bskd, v_bskd = (pad_time(x, block) for x in (q_bthd, k_bskd, v_bskd))
    segment_ids = None if segment_ids is None else pad_time(segment_ids, block)
    k_bshd, v_bshd = (jnp.repeat(x, num_heads // x.shape[2], axis=2) for x in (k_bskd, v_bskd))
    out_bthd: jax.Array = mha(
        q_bthd,
        k_bshd,
        v_bshd,
        segment_ids,
        sm_scale=scale_factor(scale, head_dim),
        causal=True,
        block_sizes=BLOCK_SIZES,
        interpret=interpret,
    )
    return out_bthd[:, :time]


TRITON = Backend(triton_attention, dtypes=HALF_PRECISION, head_dims=HEAD_DIMS, supports_window=False)
