"""Students without a past."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lark_jax.students.architecture import Architecture
from lark_jax.students.decoder import Decoder


def random_student(architecture: Architecture, seed: int, dtype: DTypeLike) -> Decoder:
    """A decoder with fresh weights, parameters and computation in `dtype`; equal seeds give equal weights."""
    dtype = jnp.dtype(dtype)
    return nnx.jit(lambda: Decoder(architecture, dtype, dtype, rngs=nnx.Rngs(seed)))()
