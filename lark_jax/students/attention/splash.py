"""Causal attention by JAX's Pallas kernel for TPUs ("splash"), forward and backward; keys are not repeated.

The kernel skips blocks that no query sees: those above the diagonal and, with a window, those before it. Scores and
softmax are fp32; products take their operands in the input's dtype.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

from lark_jax.students.attention.contract import Backend, Options, pad_time, scaled
from lark_jax.students.remat import ATTENTION

BLOCK_MULTIPLE = 128  # lanes of a vector register

# Longest row -> queries, and keys, per block. A block of n queries reads every earlier key and value once for
# 4 n head_dim operations per 4 head_dim bytes, n per byte; the chips compute 170 (v5p) to 560 (v6e) per byte read.
# Larger blocks waste more on the diagonal: block / time of all work, 6% at 8,192 and 3% at 32,768. A block of scores
# takes 4 MiB of vector memory at most.
LARGEST_BLOCK_BY_ROW = ((8_192, 512), (math.inf, 1_024))

Pullback = Any  # what `jax.vjp` returns: a pytree


def splash_attention(
    q_bthd: jax.Array, k_bskd: jax.Array, v_bskd: jax.Array, options: Options, *, interpret: bool = False
) -> jax.Array:
    """See `dispatch.attend`. Any length; the last block is padded.

    Args:
      interpret: run the kernel's program as plain JAX, on any platform (tests; slow).
    """
    segment_ids, scale, window = options
    time, head_dim = q_bthd.shape[1], q_bthd.shape[3]
    block = _block_size(time)
    q_bthd = scaled(q_bthd.astype(jnp.float32), scale, head_dim).astype(q_bthd.dtype)
    q_bhtd, k_bksd, v_bksd = (jnp.swapaxes(pad_time(x, block), 1, 2) for x in (q_bthd, k_bskd, v_bskd))
    segment_ids = None if segment_ids is None else pad_time(segment_ids, block)
    out_bhtd = _attention(_Plan(block, window, interpret), q_bhtd, k_bksd, v_bksd, segment_ids)
    return jnp.swapaxes(out_bhtd, 1, 2)[:, :time]


SPLASH = Backend(splash_attention, dtypes=(jnp.dtype(jnp.bfloat16),))


class _Plan(NamedTuple):
    block: int
    window: int | None
    interpret: bool


# The kernel has a derivative of its own. Under `jax.checkpoint` it would run forward again, though the policy saves the
# name of what it keeps (seen with JAX 0.10.2); inside this derivative it does not.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    plan: _Plan, q_bhtd: jax.Array, k_bksd: jax.Array, v_bksd: jax.Array, segment_ids_bt: jax.Array | None
) -> jax.Array:
    return _run_kernel(plan, q_bhtd, k_bksd, v_bksd, segment_ids_bt)


def _forward(
    plan: _Plan, q_bhtd: jax.Array, k_bksd: jax.Array, v_bksd: jax.Array, segment_ids_bt: jax.Array | None
) -> tuple[jax.Array, Pullback]:
    run = functools.partial(_run_kernel, plan, segment_ids_bt=segment_ids_bt)
    return jax.vjp(run, q_bhtd, k_bksd, v_bksd)


def _backward(plan: _Plan, pullback: Pullback, d_out_bhtd: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    del plan
    return (*pullback(d_out_bhtd), None)


_attention.defvjp(_forward, _backward)


def _run_kernel(
    plan: _Plan, q_bhtd: jax.Array, k_bksd: jax.Array, v_bksd: jax.Array, segment_ids_bt: jax.Array | None
) -> jax.Array:
    shape = (q_bhtd.shape[2],) * 2
    # JAX does not count the query itself.
    mask = _Causal(shape) if plan.window is None else _Local(shape, (plan.window - 1, 0), offset=0)
    block = plan.block
    block_sizes = BlockSizes(  # the same for all three kernels: output, d_k and d_v, and d_q
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    kernel = make_splash_mha(
        MultiHeadMask([mask]),  # one mask for every head
        block_sizes=block_sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION,
        interpret=plan.interpret,
    )

    def one_row(q_htd: jax.Array, k_ksd: jax.Array, v_ksd: jax.Array, segment_ids_t: jax.Array | None) -> jax.Array:
        segments = None if segment_ids_t is None else SegmentIds(q=segment_ids_t, kv=segment_ids_t)
        return kernel(q_htd, k_ksd, v_ksd, segments)

    return jax.vmap(one_row)(q_bhtd, k_bksd, v_bksd, segment_ids_bt)


class _Causal(CausalMask):
    """The kernel builder looks into every block; most are known without comparing positions."""

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        known = _known_block(*index, before=self.shape[1])
        return super().__getitem__(index) if known is None else known


class _Local(LocalMask):
    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        known = _known_block(*index, before=self.window_size[0] or 0)
        return super().__getitem__(index) if known is None else known


def _known_block(queries: slice, keys: slice, before: int) -> np.ndarray | None:
    """The mask of a block that is visible as a whole or not at all; queries see themselves and `before` more keys."""
    shape = (queries.stop - queries.start, keys.stop - keys.start)
    if keys.stop <= queries.start + 1 and keys.start >= queries.stop - 1 - before:
        return np.ones(shape, np.bool_)
    if keys.start >= queries.stop or keys.stop <= queries.start - before:
        return np.zeros(shape, np.bool_)
    return None


def _block_size(time: int) -> int:
    """The largest of the blocks that pad the row least."""
    largest = next(block for longest_row, block in LARGEST_BLOCK_BY_ROW if time <= longest_row)
    smallest = min(largest // 2, time)
    blocks = [block for block in range(BLOCK_MULTIPLE, largest + 1, BLOCK_MULTIPLE) if block >= smallest]
    return min(blocks, key=lambda block: (-(-time // block) * block, -block))
