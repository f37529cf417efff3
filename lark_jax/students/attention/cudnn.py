"""Causal attention by cuDNN's flash kernels (NVIDIA, Ampere or newer), forward and backward; keys are not repeated."""

import functools

import jax

from lark_jax.errors import ConfigError
from lark_jax.students.attention.contract import HALF_PRECISION, Backend, Options, pad_time

LARGEST_HEAD_DIM = 128  # 256 on Hopper and newer, where no student of ours needs it
HEAD_DIM_MULTIPLE = 8
TIME_MULTIPLE = 2  # the backward pass refuses odd lengths


def cudnn_attention(q_bthd: jax.Array, k_bskd: jax.Array, v_bskd: jax.Array, options: Options) -> jax.Array:
    """See `dispatch.attend`. Needs the CUDA plugin, but no device: it also compiles ahead of time. Scores are fp32.

    Raises:
      ConfigError: this JAX has no cuDNN.
    """
    _, scale, window = options  # no segment ids
    time = q_bthd.shape[1]
    q_bthd, k_bskd, v_bskd = (pad_time(x, TIME_MULTIPLE) for x in (q_bthd, k_bskd, v_bskd))
    flash = functools.partial(
        jax.nn.dot_product_attention,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),  # JAX does not count the query itself
        implementation="cudnn",
    )
    try:
        return flash(q_bthd, k_bskd, v_bskd)[:, :time]
    except RuntimeError as error:
        if "cuDNN is not detected" not in str(error):
            raise
        raise ConfigError(
            "attention backend 'cudnn': this JAX has no cuDNN; install lark_jax[gpu], or set attention to 'blockwise'"
        ) from error


CUDNN = Backend(
    cudnn_attention,
    dtypes=HALF_PRECISION,
    head_dims=range(HEAD_DIM_MULTIPLE, LARGEST_HEAD_DIM + 1, HEAD_DIM_MULTIPLE),
    supports_segments=False,
)
