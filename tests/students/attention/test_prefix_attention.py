"""Attention after shared prefixes against float64 softmax over lists of keys, query by query."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lark_jax.students.attention import prefix as prefix_attention
from lark_jax.students.attention.prefix import RowLayout, SharedKeys, attend_with_prefix

ROWS, TIME, PREFIX, HEADS, KV_HEADS, HEAD_DIM = 6, 150, 21, 6, 2, 10


@pytest.mark.parametrize("most_scores", [1, 40_000, 1 << 24], ids=["query by query", "43 queries", "at once"])
@pytest.mark.parametrize(("scale", "window"), [(None, None), (0.2, 17)])
def test_each_query_sees_its_prefix_itself_and_its_segment_before_it(
    most_scores: int, scale: float | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_attention, "MOST_SCORES", most_scores)
    rng = np.random.default_rng()
    q = rng.standard_normal((ROWS, TIME, HEADS, HEAD_DIM))
    k, v = rng.standard_normal((2, ROWS, TIME, KV_HEADS, HEAD_DIM))
    shared_k, shared_v = rng.standard_normal((2, 3, PREFIX, KV_HEADS, HEAD_DIM))
    prefixes = rng.integers(0, 3, ROWS)
    lengths = np.array([0, 1, PREFIX, 7, 20, 3])
    segments = np.sort(rng.integers(0, 6, (ROWS, TIME)), axis=1)
    layout = RowLayout(*(jnp.asarray(x, jnp.int32) for x in (prefixes, lengths, segments)))
    shared = SharedKeys(jnp.asarray(shared_k, jnp.float32), jnp.asarray(shared_v, jnp.float32))
    rows = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    attention = functools.partial(attend_with_prefix, scale=scale, window=window)
    found = np.asarray(jax.jit(attention)(*rows, shared, layout))

    for row, token, head in zip(*(rng.integers(0, size, 200) for size in (ROWS, TIME, HEADS)), strict=True):
        kv_head = head // (HEADS // KV_HEADS)
        seen = np.flatnonzero((segments[row] == segments[row, token]) & (np.arange(TIME) <= token))
        prefix = prefixes[row], slice(0, lengths[row]), kv_head
        keys = np.concatenate([shared_k[prefix], k[row, seen, kv_head]])[-(window or 0) :]
        values = np.concatenate([shared_v[prefix], v[row, seen, kv_head]])[-(window or 0) :]
        weights = np.exp(keys @ q[row, token, head] * (scale or HEAD_DIM**-0.5))
        expected = weights @ values / weights.sum()
        np.testing.assert_allclose(found[row, token, head], expected, rtol=1e-5, atol=1e-6)


def test_a_long_row_needs_no_memory_for_all_its_scores() -> None:
    time, prefix, heads, kv_heads, head_dim = 16_384, 256, 28, 4, 128
    rows = [jax.ShapeDtypeStruct((1, time, n, head_dim), jnp.bfloat16) for n in (heads, kv_heads, kv_heads)]
    shared = SharedKeys(*[jax.ShapeDtypeStruct((1, prefix, kv_heads, head_dim), jnp.bfloat16)] * 2)
    layout = RowLayout(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in [(1,), (1,), (1, time)]))
    compiled = jax.jit(attend_with_prefix).lower(*rows, shared, layout).compile()
    held_at_a_time = 4 * prefix_attention.MOST_SCORES  # bytes
    queries = 2 * time * heads * head_dim
    # All scores, a query on half of the keys on average, would be 14 GiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * (held_at_a_time + queries)
