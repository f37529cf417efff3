"""Rotary position embedding in HF's "rotate half" layout, always in fp32."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lark_jax.students.architecture import Architecture, RopeScaling


def inverse_frequencies(architecture: Architecture) -> np.ndarray:
    """fp32 [head_dim / 2]: radians per position of each rotated pair, after scaling (HF `modeling_rope_utils`).

    Rounded to fp32 where HF rounds: one unit in the last place of a frequency is up to 4e-3 rad at position 32,768.
    """
    exponents = np.arange(0, architecture.head_dim, 2, dtype=np.float32) / np.float32(architecture.head_dim)
    periods = (architecture.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
    return _scaled(np.float32(1) / periods, architecture.rope_scaling)


def rotation_tables(architecture: Architecture, positions_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, fp32 [batch, time, head_dim / 2], of integer positions [batch, time]."""
    # An elementwise product: a matmul could round positions past 256 to bfloat16 on accelerators.
    positions = positions_bt.astype(jnp.float32)[:, :, None]
    angles = positions * jnp.asarray(inverse_frequencies(architecture))[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_bthd: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + head_dim / 2) of every head; computed in fp32, returned in the input's dtype."""
    first, second = jnp.split(x_bthd.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_bthd.dtype)


def _scaled(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    if scaling.rope_type == "default":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    return _llama3_scaled(frequencies, scaling)


def _llama3_scaled(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those in between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor
