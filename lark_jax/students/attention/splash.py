"""Causal attention by JAX's Pallas kernel for TPUs ("splash"), forward and backward; keys are not repeated.

Blocks above the diagonal are never visited. Scores and softmax are fp32; products are taken in the input's dtype.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jax.lax import Precision

from lark_jax.students.attention.blockwise import pad_time
from lark_jax.students.remat import ATTENTION

BLOCK_MULTIPLE = 128  # lanes of a vector register

# Longest row -> queries, and keys, per block. A block of n queries reads every earlier key and value once for
# 4 n head_dim operations per 4 head_dim bytes, n per byte; the chips compute 170 (v5p) to 560 (v6e) per byte read.
# Larger blocks waste more on the diagonal: block / time of all work, 6% at 8,192 and 3% at 32,768. A block of scores
# takes 4 MiB of vector memory at most.
LARGEST_BLOCK_BY_ROW = ((8_192, 512), (math.inf, 1_024))

Pullback = Any  # what `jax.vjp` returns: a pytree


def splash_refusal(dtype: jnp.dtype, head_dim: int, packed: bool) -> str | None:
    """Why this kernel cannot compute this attention; None: it can."""
    del head_dim, packed  # any head_dim compiles; segment ids are honoured
    return None if dtype == jnp.bfloat16 else f"computes in bfloat16, not {dtype}"


def splash_attention(
    q_bthd: jax.Array,
    k_bskd: jax.Array,
    v_bskd: jax.Array,
    segment_ids_bt: jax.Array | None,
    precision: Precision,
    *,
    interpret: bool = False,
) -> jax.Array:
    """See `attention.attend`. Any length; the last block is padded.

    Args:
      interpret: run the kernel's program as plain JAX, on any platform (tests; slow).
    """
    del precision  # bfloat16 has one
    time = q_bthd.shape[1]
    block = _block_size(time)
    q_bthd = (q_bthd.astype(jnp.float32) / math.sqrt(q_bthd.shape[-1])).astype(q_bthd.dtype)
    # Padding lies after every real token: real queries never see it.
    q_bhtd, k_bksd, v_bksd = (jnp.swapaxes(pad_time(x, block), 1, 2) for x in (q_bthd, k_bskd, v_bskd))
    segment_ids_bt = None if segment_ids_bt is None else pad_time(segment_ids_bt, block)
    out_bhtd = _attention(block, interpret, q_bhtd, k_bksd, v_bksd, segment_ids_bt)
    return jnp.swapaxes(out_bhtd, 1, 2)[:, :time]


# The kernel has a derivative of its own. Under `jax.checkpoint` it would run forward again, though what it keeps has a
# name that the policy saves (seen with JAX 0.10.2); behind this one it does not.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    block: int,
    interpret: bool,
    q_bhtd: jax.Array,
    k_bksd: jax.Array,
    v_bksd: jax.Array,
    segment_ids_bt: jax.Array | None,
) -> jax.Array:
    return _run_kernel(block, interpret, q_bhtd, k_bksd, v_bksd, segment_ids_bt)


def _forward(
    block: int,
    interpret: bool,
    q_bhtd: jax.Array,
    k_bksd: jax.Array,
    v_bksd: jax.Array,
    segment_ids_bt: jax.Array | None,
) -> tuple[jax.Array, Pullback]:
    run = functools.partial(_run_kernel, block, interpret, segment_ids_bt=segment_ids_bt)
    return jax.vjp(run, q_bhtd, k_bksd, v_bksd)


def _backward(
    block: int, interpret: bool, pullback: Pullback, d_out_bhtd: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    del block, interpret
    return (*pullback(d_out_bhtd), None)


_attention.defvjp(_forward, _backward)


def _run_kernel(
    block: int,
    interpret: bool,
    q_bhtd: jax.Array,
    k_bksd: jax.Array,
    v_bksd: jax.Array,
    segment_ids_bt: jax.Array | None,
) -> jax.Array:
    # One mask serves every head.
    mask = MultiHeadMask([_Causal((q_bhtd.shape[2],) * 2)])
    kernel = make_splash_mha(
        mask,
        block_sizes=_block_sizes(block),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )

    def one_row(q_htd: jax.Array, k_ksd: jax.Array, v_ksd: jax.Array, segment_ids_t: jax.Array | None) -> jax.Array:
        segments = None if segment_ids_t is None else SegmentIds(q=segment_ids_t, kv=segment_ids_t)
        return kernel(q_htd, k_ksd, v_ksd, segments)

    return jax.vmap(one_row)(q_bhtd, k_bksd, v_bksd, segment_ids_bt)


class _Causal(CausalMask):
    """The kernel builder looks into every block; those off the diagonal are known without comparing positions."""

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        queries, keys = index
        shape = (queries.stop - queries.start, keys.stop - keys.start)
        if keys.stop <= queries.start + 1:
            return np.ones(shape, np.bool_)
        if keys.start >= queries.stop:
            return np.zeros(shape, np.bool_)
        return super().__getitem__(index)


def _block_sizes(block: int) -> BlockSizes:
    """The same blocks for all three kernels (output, d_q, d_k and d_v)."""
    return BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )


def _block_size(time: int) -> int:
    """What pads the row least, and of those the largest block."""
    largest = next(block for longest_row, block in LARGEST_BLOCK_BY_ROW if time <= longest_row)
    smallest = min(largest // 2, time)
    blocks = [block for block in range(BLOCK_MULTIPLE, largest + 1, BLOCK_MULTIPLE) if block >= smallest]
    return min(blocks, key=lambda block: (-(-time // block) * block, -block))
