"""What every attention backend is tested with: cases, a float64 NumPy reference, and inputs.

Which backend runs which case follows from what the backend declares, see `supported_cases`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lark_jax.students.architecture import architecture_from_config
from lark_jax.students.attention.contract import AttentionSpec, Options
from lark_jax.students.attention.dispatch import BACKENDS

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))
from shapes import SHAPES


@dataclass(frozen=True)
class Case:
    time: int
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 16
    packed: bool = False
    scale: float | None = None
    window: int | None = None
    batch: int = 2

    def spec(self, dtype) -> AttentionSpec:
        return AttentionSpec(jnp.dtype(dtype), self.head_dim, self.packed, self.window, self.scale)

    def __str__(self) -> str:
        extras = [f"{name}{value}" for name in ("scale", "window") if (value := getattr(self, name))]
        return "-".join([f"{self.time}x{self.num_heads}x{self.num_kv_heads}x{self.head_dim}", *extras])


# Around blocks of 32 and 128, which the CPU tests use; awkward lengths, heads and groups.
CASES = (
    Case(1, packed=True),
    Case(2, 3, 3),
    Case(17, 6, 2, packed=True),
    Case(32, 2, 2),
    Case(33, 5, 1, head_dim=10),
    Case(141, 6, 2, packed=True),
    Case(141, 7, 1),
    Case(77, 8, 4, scale=0.37),
    Case(19, 2, 1, window=1),
    Case(40, 2, 2, window=39),
    Case(141, 4, 2, window=32),
    Case(150, 4, 2, window=45, packed=True, scale=0.2),
    Case(261, 2, 1, window=129, batch=1),
)


def published_cases(time: int, num_kv_heads: int | None = None) -> tuple[Case, ...]:
    """The heads of published students; with `num_kv_heads`, fewer of them in the same groups."""
    cases = {}
    for config in SHAPES.values():
        a = architecture_from_config(dict(config))
        kv = num_kv_heads or a.num_kv_heads
        cases[Case(time, a.num_heads // a.num_kv_heads * kv, kv, a.head_dim, batch=1)] = None
    return tuple(cases)


def supported_cases(backend: str, cases=CASES, dtype="bfloat16") -> list[Case]:
    return [case for case in cases if BACKENDS[backend].refusal(case.spec(dtype)) is None]


def random_inputs(time, num_heads=2, num_kv_heads=1, head_dim=6, batch=2, scale=2.0):
    rng = np.random.default_rng()
    shapes = [(batch, time, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for shape in shapes]


def random_segments(time, batch=2, num_segments=5):
    return np.sort(np.random.default_rng().integers(0, num_segments, (batch, time)), axis=1).astype(np.int32)


def inputs_of(case: Case, dtype="float32"):
    """q, k, v, a cotangent of the output, and segment ids or None."""
    qkv = [
        x.astype(dtype) for x in random_inputs(case.time, case.num_heads, case.num_kv_heads, case.head_dim, case.batch)
    ]
    cotangent = jnp.asarray(np.random.default_rng().normal(size=qkv[0].shape), dtype)
    return *qkv, cotangent, jnp.asarray(random_segments(case.time, case.batch)) if case.packed else None


def output_and_gradients(attention, case: Case):
    """Compiled function of what `inputs_of` returns; `attention` is called as a backend's."""

    @jax.jit
    def run(q, k, v, cotangent, segment_ids):
        def attend(q, k, v):
            return attention(q, k, v, Options(segment_ids, case.scale, case.window))

        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(cotangent)

    return run


def reference(q, k, v, cotangent=None, segments=None, *, scale=None, window=None):
    """Output, and gradients of sum(output * cotangent); float64, head by head, as the definition has it."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    cotangent = np.zeros_like(q) if cotangent is None else np.asarray(cotangent, np.float64)
    batch, time, num_heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    distance = np.arange(time)[:, None] - np.arange(time)[None, :]
    seen = np.broadcast_to((distance >= 0) & (distance < (window or time)), (batch, time, time))
    if segments is not None:
        segments = np.asarray(segments)
        seen = seen & (segments[:, :, None] == segments[:, None, :])
    out, d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(batch):
        for h in range(num_heads):
            kv = h // (num_heads // k.shape[2])
            scores = np.where(seen[b], scale * q[b, :, h] @ k[b, :, kv].T, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[b, :, h] = weights @ v[b, :, kv]
            d_weights = cotangent[b, :, h] @ v[b, :, kv].T
            d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True))
            d_q[b, :, h] = scale * d_scores @ k[b, :, kv]
            d_k[b, :, kv] += scale * d_scores.T @ q[b, :, h]
            d_v[b, :, kv] += weights.T @ cotangent[b, :, h]
    return out, d_q, d_k, d_v
