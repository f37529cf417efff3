"""Causal grouped-query attention behind one function, with a registry of backends."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision

from lark_jax.errors import ConfigError
from lark_jax.students.attention.blockwise import blockwise_attention
from lark_jax.students.attention.cudnn import cudnn_attention, cudnn_refusal
from lark_jax.students.attention.dense import dense_attention
from lark_jax.students.attention.splash import splash_attention, splash_refusal
from lark_jax.students.attention.triton import triton_attention, triton_refusal

# Measured on a CPU (4 heads of 32, forward and backward): about equal here, dense 2x slower at 512, 6x at 2,048.
LONGEST_DENSE_ROW = 256
LONGEST_DENSE_ROW_BESIDE_KERNELS = 128  # one block of a kernel
AMPERE = 8.0  # the first compute capability with cuDNN's flash kernels
# By platform, as `jax.default_backend()` names it: the first that can compute something is taken.
KERNELS: Mapping[str, Sequence[str]] = {"gpu": ("cudnn", "triton"), "tpu": ("splash",)}

# q_bthd, k_bskd, v_bskd, segment_ids_bt, precision -> out_bthd
Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None, Precision], jax.Array]


def no_refusal(dtype: jnp.dtype, head_dim: int, packed: bool) -> None:
    """The refusal of a backend that computes everything."""
    del dtype, head_dim, packed


class Backend(NamedTuple):
    attention: Attention
    refusal: Callable[[jnp.dtype, int, bool], str | None]  # dtype, head_dim, with segment ids? -> why not, or None


BACKENDS: Mapping[str, Backend] = {
    "dense": Backend(dense_attention, no_refusal),
    "blockwise": Backend(blockwise_attention, no_refusal),
    "cudnn": Backend(cudnn_attention, cudnn_refusal),
    "triton": Backend(triton_attention, triton_refusal),
    "splash": Backend(splash_attention, splash_refusal),
}


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
      segment_ids: int [batch, time]; tokens of different segments do not see each other. A segment is contiguous.
        None: one segment a row.
      backend: a key of `BACKENDS`; None: `default_backend` for this machine. On several TPU devices the Pallas kernel
        runs inside `shard_map` only, since the compiler cannot partition it; with `check_vma=False`, since the kernel
        does not say over which axes its results vary.

    Returns:
      [batch, time, num_heads, head_dim] in the dtype of `q_bthd`; scores and softmax are fp32.

    Raises:
      ValueError: unknown backend, or one that cannot compute this (dtype, head_dim, segment ids).
      ConfigError: the backend is not installed.
    """
    _, time, _, head_dim = q_bthd.shape
    packed = segment_ids is not None
    if backend is None:
        backend = default_backend(time, _platform(), q_bthd.dtype, head_dim, packed=packed)
    refusal = _backend(backend).refusal(q_bthd.dtype, head_dim, packed)
    if refusal is not None:
        able = (name for name, other in BACKENDS.items() if other.refusal(q_bthd.dtype, head_dim, packed) is None)
        raise ValueError(f"attention backend {backend!r} {refusal}; these can: {', '.join(able)}")
    with jax.named_scope(f"attention_{backend}"):
        attention = BACKENDS[backend].attention
        return attention(q_bthd, k_bskd, v_bskd, segment_ids, matmul_precision(q_bthd.dtype))


def default_backend(length: int, platform: str, dtype: jnp.dtype, head_dim: int, *, packed: bool = False) -> str:
    """For rows of `length` tokens.

    Args:
      platform: "cpu", "gpu" or "tpu".
      packed: rows have segment ids.
    """
    for kernel in KERNELS.get(platform, ()):
        if BACKENDS[kernel].refusal(jnp.dtype(dtype), head_dim, packed) is None:
            return "dense" if length <= LONGEST_DENSE_ROW_BESIDE_KERNELS else kernel
    return "dense" if length <= LONGEST_DENSE_ROW else "blockwise"


def describe_backend(
    backend: str | None,
    lengths: Sequence[int],
    platform: str,
    dtype: jnp.dtype,
    head_dim: int,
    *,
    packed: bool = False,
) -> str:
    """One line on what `attend` will use for rows of these lengths.

    Args:
      backend: as in `attend`.
      packed: rows have segment ids.

    Raises:
      ConfigError: `backend` cannot run on this platform, or not for this student.
    """
    if backend is not None:
        _check_runs_here(backend, platform, jnp.dtype(dtype), head_dim, packed)
        return f"attention: {backend}"
    rows_of: dict[str, list[int]] = {}
    for length in sorted(lengths):
        name = default_backend(length, platform, dtype, head_dim, packed=packed)
        rows_of.setdefault(name, []).append(length)
    kind = "packed rows" if packed else "rows"
    uses = [f"{name} ({kind} of {_interval(rows)} tokens)" for name, rows in rows_of.items()]
    return f"attention: {', '.join(uses)}"


def matmul_precision(dtype: jnp.dtype) -> Precision:
    """fp32 inputs are multiplied as fp32 on every platform (GPUs would take TF32, TPUs bfloat16)."""
    return Precision.HIGHEST if dtype == jnp.float32 else Precision.DEFAULT


def _backend(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown; known: {', '.join(BACKENDS)}")
    return BACKENDS[name]


def kernel_platform(device: jax.Device) -> str:
    """The platform whose kernels run on `device`; "cpu", which has none, for GPUs that cuDNN's flash kernels refuse."""
    if device.platform != "gpu":
        return device.platform
    try:
        return "gpu" if float(device.compute_capability) >= AMPERE else "cpu"
    except ValueError:  # not NVIDIA's
        return "cpu"


def _platform() -> str:
    """The platform whose kernels can be called at this point of a trace."""
    platform = jax.default_backend()
    if platform == "gpu":
        platform = kernel_platform(jax.devices()[0])
    inside_shard_map = bool(jax.sharding.get_abstract_mesh().manual_axes)
    partitioned_by_the_compiler = not inside_shard_map and jax.device_count() > 1
    return "cpu" if platform == "tpu" and partitioned_by_the_compiler else platform


def _check_runs_here(backend: str, platform: str, dtype: jnp.dtype, head_dim: int, packed: bool) -> None:
    home = next((where for where, kernels in KERNELS.items() if backend in kernels), platform)
    if home != platform:
        raise ConfigError(f"attention backend {backend!r} runs on {home}, not on {platform}; use 'auto' or 'blockwise'")
    refusal = _backend(backend).refusal(dtype, head_dim, packed)
    if refusal is not None:
        raise ConfigError(f"attention backend {backend!r} {refusal}; use 'auto' or 'blockwise'")


def _interval(rows: Sequence[int]) -> str:
    return f"{rows[0]:,}" if rows[0] == rows[-1] else f"{rows[0]:,} to {rows[-1]:,}"
