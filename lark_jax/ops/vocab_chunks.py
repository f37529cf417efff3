"""Windows over vocabulary and tokens, and the logits of one window, for all ops over a chunked head.

The last window is moved back so that it ends where the array ends. So nothing is padded or copied (a padded copy of a
152,064 x 3,584 head takes 1 GB), all windows have the same shape, and entries of an earlier window are not `fresh`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

DEFAULT_VOCAB_CHUNK = 4096  # rows of the head; wide enough for full matmul speed on one accelerator
MAX_BLOCK_LOGITS = 1 << 24  # fp32 logits that exist at a time: 64 MiB


class Window(NamedTuple):
    start: jax.Array  # int32 scalar
    ids: jax.Array  # int32 [width]: positions in the whole axis
    fresh: jax.Array  # bool [width]: False if an earlier window has the position


def num_windows(size: int, width: int) -> int:
    return -(-size // width)


def window(index: jax.Array, width: int, size: int) -> Window:
    """Window number `index` of `num_windows(size, width)` over an axis of length `size` >= `width`."""
    start = jnp.minimum(index * width, size - width)
    ids = start + jnp.arange(width, dtype=jnp.int32)
    return Window(start, ids, ids >= index * width)


def take(array: jax.Array, window: Window, axis: int) -> jax.Array:
    """Slice of `array` inside `window`.

    XLA's CPU backend widens a bf16 array to fp32 around a slice or gather, and hoists the conversion of the whole array
    out of the loop (2 GB for the head of a 7B student). The barrier prevents this; it costs other backends nothing.
    """
    array, start = lax.optimization_barrier((array, window.start))
    return lax.dynamic_slice_in_dim(array, start, window.ids.shape[0], axis)


def take_rows(array: jax.Array, ids: jax.Array) -> jax.Array:
    """array[ids] along the first axis; ids outside it are clipped. The barrier is as in `take`."""
    array, ids = lax.optimization_barrier((array, ids))
    return array.at[ids].get(mode="clip")


def put(array: jax.Array, values: jax.Array, window: Window, axis: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array, values, window.start, axis)


def contract(lhs: jax.Array, lhs_axes: tuple[int, ...], rhs: jax.Array, rhs_axes: tuple[int, ...]) -> jax.Array:
    """Dot product over the given axes with fp32 accumulation and fp32 result.

    fp32 operands are multiplied in full precision; by default TPUs and GPUs round them to bfloat16 or TF32 first.
    """
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        lhs.astype(dtype),
        rhs.astype(dtype),
        dimension_numbers=((lhs_axes, rhs_axes), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def chunk_logits(hidden: jax.Array, head_cd: jax.Array) -> jax.Array:
    """fp32 logits [..., c] of hidden states [..., d] for the head's rows [c, d]."""
    return contract(hidden, (hidden.ndim - 1,), head_cd, (1,))


def cross_entropy_from_sums(gold: jax.Array, max_other: jax.Array, sum_other: jax.Array) -> jax.Array:
    """-log p(gold) from z_y, m = max z_v and sum exp(z_v - m) over v != y, with full relative precision.

    If gold has the largest logit, log1p keeps the digits that the difference of log-sum-exp and logit would lose.
    """
    top = jnp.maximum(gold, max_other)
    sum_scaled = sum_other * jnp.exp(max_other - top)
    return jnp.where(gold >= max_other, jnp.log1p(sum_scaled), jnp.log(sum_scaled + jnp.exp(gold - top)) + top - gold)


def check_op_shapes(hidden: jax.Array, head: jax.Array, targets: jax.Array, vocab_chunk: int | None) -> None:
    """Checks that the operands fit together.

    Raises:
      ValueError: shapes or dtypes do not match the ops' contract, or vocab_chunk < 1.
    """
    if head.ndim != 2 or head.shape[0] < 1 or hidden.ndim < 1 or hidden.shape[-1] != head.shape[1]:
        raise ValueError(f"hidden {hidden.shape} and head {head.shape}: expected [..., d] and [V, d]")
    if targets.shape != hidden.shape[:-1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets {targets.dtype}{targets.shape}: expected integers of shape {hidden.shape[:-1]}")
    if vocab_chunk is not None and vocab_chunk < 1:
        raise ValueError(f"vocab_chunk: expected an integer >= 1, got {vocab_chunk}")


def zeros_beside(shape: tuple[int, ...], dtype: DTypeLike, *arrays: jax.Array) -> jax.Array:
    """Zeros for a loop carry that accumulates values computed from all of `arrays` (none empty).

    Inside `shard_map` a carry must vary over the same mesh axes from the start; these zeros take the axes from a scalar
    of each array. Outside they are plain zeros.
    """
    scalars = [array[(0,) * array.ndim].astype(jnp.float32) for array in arrays]
    return jnp.zeros_like(sum(scalars[1:], scalars[0]), shape=shape, dtype=dtype)
