"""Dense attention in float64 NumPy, and random inputs for it."""

import jax.numpy as jnp
import numpy as np


def reference(q, k, v, segments=None):
    """Loops over rows and heads; float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, time, num_heads, head_dim = q.shape
    allowed = np.broadcast_to(np.tril(np.ones((time, time), bool)), (batch, time, time))
    if segments is not None:
        allowed = allowed & (segments[:, :, None] == segments[:, None, :])
    out = np.empty_like(q)
    for b in range(batch):
        for h in range(num_heads):
            kv = h // (num_heads // k.shape[2])
            scores = np.where(allowed[b], q[b, :, h] @ k[b, :, kv].T / np.sqrt(head_dim), -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[b, :, h] = weights @ v[b, :, kv] / weights.sum(axis=-1, keepdims=True)
    return out


def random_inputs(time, num_heads=2, num_kv_heads=1, head_dim=6, batch=2, scale=2.0):
    rng = np.random.default_rng()
    shapes = [(batch, time, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for shape in shapes]


def random_segments(time, batch=2, num_segments=5):
    return np.sort(np.random.default_rng().integers(0, num_segments, (batch, time)), axis=1).astype(np.int32)
