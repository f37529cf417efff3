"""Causal attention by cuDNN's flash kernels (NVIDIA, Ampere or newer), forward and backward; keys are not repeated."""

import functools

import jax
import jax.numpy as jnp
from jax.lax import Precision

from lark_jax.errors import ConfigError
from lark_jax.students.attention.blockwise import pad_time

LARGEST_HEAD_DIM = 128  # 256 on Hopper and newer, where no student of ours needs it
HEAD_DIM_MULTIPLE = 8
TIME_MULTIPLE = 2  # the backward pass refuses odd lengths


def cudnn_refusal(dtype: jnp.dtype, head_dim: int, packed: bool) -> str | None:
    """Why cuDNN cannot compute this attention; None: it can."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, not {dtype}"
    if head_dim > LARGEST_HEAD_DIM or head_dim % HEAD_DIM_MULTIPLE:
        return f"needs a head_dim that is a multiple of {HEAD_DIM_MULTIPLE} up to {LARGEST_HEAD_DIM}, not {head_dim}"
    return "does not honour segment ids" if packed else None


def cudnn_attention(
    q_bthd: jax.Array,
    k_bskd: jax.Array,
    v_bskd: jax.Array,
    segment_ids_bt: jax.Array | None,
    precision: Precision,
) -> jax.Array:
    """See `attention.attend`. Needs the CUDA plugin, but no device: it compiles ahead of time, too.

    Raises:
      ConfigError: this JAX has no cuDNN.
    """
    del segment_ids_bt, precision  # refused before; scores are fp32 sums of bf16 or fp16 products
    time = q_bthd.shape[1]
    q_bthd, k_bskd, v_bskd = (pad_time(x, TIME_MULTIPLE) for x in (q_bthd, k_bskd, v_bskd))
    flash = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    try:
        return flash(q_bthd, k_bskd, v_bskd)[:, :time]
    except RuntimeError as error:
        if "cuDNN is not detected" not in str(error):
            raise
        raise ConfigError(
            "attention backend 'cudnn': this JAX has no cuDNN; install lark_jax[gpu], or set attention to 'blockwise'"
        ) from error
