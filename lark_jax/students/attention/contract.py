"""What every attention backend computes and declares, and `dense_attention`, which computes it literally.

A backend is a function and, as data next to it, what it supports. `Backend.refusal` follows from that data.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision

HALF_PRECISION = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


class Options(NamedTuple):
    """Arguments of `dispatch.attend` other than queries, keys and values."""

    segment_ids: jax.Array | None = None
    scale: float | None = None
    window: int | None = None  # smaller than the row


Attention = Callable[[jax.Array, jax.Array, jax.Array, Options], jax.Array]  # q_bthd, k_bskd, v_bskd -> out_bthd


@dataclass(frozen=True)
class AttentionSpec:
    """The part of an attention's definition that backends may or may not support."""

    dtype: jnp.dtype
    head_dim: int
    packed: bool = False  # rows have segment ids
    window: int | None = None
    scale: float | None = None

    def for_rows_of(self, length: float) -> "AttentionSpec":
        """Without a window that covers the whole row."""
        return replace(self, window=None) if self.window is not None and self.window >= length else self


@dataclass(frozen=True)
class Backend:
    """An implementation of attention and its limits."""

    attention: Attention
    dtypes: Sequence[jnp.dtype] | None = None  # None: every float dtype
    head_dims: Sequence[int] | None = None  # None: all
    supports_segments: bool = True
    supports_window: bool = True
    supports_scale: bool = True

    def refusal(self, spec: AttentionSpec) -> str | None:
        """Why this backend cannot compute `spec`, as the end of a sentence; None: it can."""
        if self.dtypes is not None and spec.dtype not in self.dtypes:
            return f"computes in {' or '.join(map(str, self.dtypes))}, not {spec.dtype}"
        if self.head_dims is not None and spec.head_dim not in self.head_dims:
            return f"needs a head_dim {_described(self.head_dims)}, not {spec.head_dim}"
        unsupported = {
            "segment ids": spec.packed and not self.supports_segments,
            "a sliding window": spec.window is not None and not self.supports_window,
            "a scale": spec.scale is not None and not self.supports_scale,
        }
        return next((f"does not support {what}" for what, refused in unsupported.items() if refused), None)


def _described(head_dims: Sequence[int]) -> str:
    if isinstance(head_dims, range):
        return f"that is a multiple of {head_dims.step} up to {head_dims[-1]}"
    return f"of {', '.join(map(str, head_dims))}"


def dense_attention(q_bthd: jax.Array, k_bskd: jax.Array, v_bskd: jax.Array, options: Options) -> jax.Array:
    """See `dispatch.attend`. Holds the [time, time] score matrix: the fastest for short rows. Softmax in fp32."""
    segment_ids, scale, window = options
    batch, time, num_heads, head_dim = q_bthd.shape
    num_kv_heads = k_bskd.shape[2]
    precision = matmul_precision(q_bthd.dtype)
    q_btkgd = q_bthd.reshape(batch, time, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", q_btkgd, k_bskd, precision=precision, preferred_element_type=jnp.float32)
    allowed = visible_keys(jnp.arange(time), jnp.arange(time), segment_ids, segment_ids, window)[:, None, None]
    scores = jnp.where(allowed, scaled(scores, scale, head_dim), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_bskd.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v_bskd, precision=precision, preferred_element_type=jnp.float32)
    return out.reshape(q_bthd.shape).astype(q_bthd.dtype)


DENSE = Backend(dense_attention)


def visible_keys(
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """Boolean [batch or 1, queries, keys]: a query sees itself and earlier keys of its own segment.

    With a window, it sees itself and the `window` - 1 positions before it (HF's `sliding_window`).
    """
    visible = (query_positions[:, None] >= key_positions[None, :])[None]
    if window is not None:
        visible &= (key_positions[None, :] > query_positions[:, None] - window)[None]
    if query_segments is None or key_segments is None:
        return visible
    return visible & (query_segments[:, :, None] == key_segments[:, None, :])


def scaled(x: jax.Array, scale: float | None, head_dim: int) -> jax.Array:
    """Scores, or queries, times `scale`; None: divided by sqrt(head_dim)."""
    return x / math.sqrt(head_dim) if scale is None else x * scale


def scale_factor(scale: float | None, head_dim: int) -> float:
    return 1 / math.sqrt(head_dim) if scale is None else scale


def matmul_precision(dtype: jnp.dtype) -> Precision:
    """fp32 inputs are multiplied as fp32 on every platform (GPUs would take TF32, TPUs bfloat16)."""
    return Precision.HIGHEST if dtype == jnp.float32 else Precision.DEFAULT


def segment_starts(segment_ids_bt: jax.Array) -> jax.Array:
    """int32 [batch, time]: the index of the first token of each token's segment."""
    index_t = jnp.arange(segment_ids_bt.shape[1], dtype=jnp.int32)[None, :]
    changes_bt = segment_ids_bt[:, 1:] != segment_ids_bt[:, :-1]
    is_first_bt = jnp.pad(changes_bt, ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(is_first_bt, index_t, 0), axis=1)


def pad_time(x: jax.Array, multiple: int) -> jax.Array:
    """Zeros after the time axis, which is the second, up to a multiple of `multiple`.

    Real queries never see padding: it comes after them.
    """
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % multiple)
    return jnp.pad(x, padding)
