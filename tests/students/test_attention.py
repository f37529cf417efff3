"""Every attention backend against a dense float64 NumPy reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from lark_jax.students import blockwise_attention
from lark_jax.students.attention import BACKENDS, LONGEST_DENSE_ROW, attend, default_backend

BLOCK = 32


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in short rows."""
    monkeypatch.setattr(blockwise_attention, "LARGEST_BLOCK", BLOCK)


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


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("time", [1, 2, 17, BLOCK, BLOCK + 1, 4 * BLOCK + 13])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_dense_float64(backend, time, packed):
    q, k, v = random_inputs(time)
    segments = random_segments(time) if packed else None
    attend_jit = jax.jit(attend, static_argnames="backend")
    out = attend_jit(q, k, v, segment_ids=None if segments is None else jnp.asarray(segments), backend=backend)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, reference(q, k, v, segments), rtol=0, atol=2e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (3, 3), (6, 2), (5, 1), (8, 4)])
def test_query_heads_share_key_heads_in_order(backend, num_heads, num_kv_heads):
    q, k, v = random_inputs(BLOCK + 1, num_heads, num_kv_heads)
    np.testing.assert_allclose(attend(q, k, v, backend=backend), reference(q, k, v), rtol=0, atol=2e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_bf16_differs_from_float64_by_bf16_rounding_only(backend):
    q, k, v = (x.astype(jnp.bfloat16) for x in random_inputs(5 * BLOCK - 3, 4, 2))
    out = attend(q, k, v, backend=backend)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), reference(q, k, v), rtol=0, atol=0.06)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_large_scores_do_not_overflow(backend):
    q, k, v = random_inputs(3 * BLOCK + 5, scale=40.0)
    out = attend(q, k, v, backend=backend)
    np.testing.assert_allclose(out, reference(q, k, v), rtol=0, atol=5e-2)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("time", [1, 19, BLOCK + 3, 4 * BLOCK - 1])
@pytest.mark.parametrize("packed", [False, True])
def test_blockwise_gradient_equals_that_of_the_dense_backend(time, packed):
    q, k, v = random_inputs(time, 6, 2, scale=1.0)
    segments = jnp.asarray(random_segments(time)) if packed else None
    cotangent = jnp.asarray(np.random.default_rng().normal(size=q.shape), jnp.float32)

    def gradients(backend):
        def weighted_sum(*qkv):
            return (attend(*qkv, segment_ids=segments, backend=backend) * cotangent).sum()

        return jax.jit(jax.grad(weighted_sum, argnums=(0, 1, 2)))(q, k, v)

    for blockwise, dense in zip(gradients("blockwise"), gradients("dense"), strict=True):
        np.testing.assert_allclose(blockwise, dense, rtol=0, atol=1e-5 * float(jnp.abs(dense).max() + 1))


def test_dense_gradient_equals_finite_differences_in_float64():
    q, k, v = random_inputs(9, 2, 1, batch=1, scale=1.0)
    direction = np.random.default_rng().normal(size=q.shape)
    gradient = jax.grad(lambda q: (attend(q, k, v, backend="dense") ** 2).sum())(q)
    step = 1e-5
    ahead, behind = (np.sum(reference(np.asarray(q, np.float64) + s * direction, k, v) ** 2) for s in (step, -step))
    np.testing.assert_allclose(np.sum(gradient * direction), (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-4)


def test_blockwise_memory_grows_with_time_and_not_with_its_square():
    def temporary_bytes(time, backend):
        arguments = [jax.ShapeDtypeStruct((1, time, heads, 16), jnp.bfloat16) for heads in (4, 2, 2)]
        loss = jax.grad(lambda *qkv: attend(*qkv, backend=backend).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        return jax.jit(loss).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    short, long = (temporary_bytes(time, "blockwise") for time in (8_192, 32_768))
    scores_8k = 4 * 8_192 * 8_192 * 4
    assert short < scores_8k / 20
    assert long < 4.5 * short
    assert temporary_bytes(8_192, "dense") > scores_8k / 2


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_works_inside_shard_map(backend):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    q, k, v = random_inputs(2 * BLOCK + 3, batch=8)

    def loss(q, k, v):
        return (attend(q, k, v, backend=backend) ** 2).sum()

    rows = PartitionSpec("data")
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    local = jax.shard_map(gradient, mesh=mesh, in_specs=rows, out_specs=rows)
    for ours, expected in zip(jax.jit(local)(q, k, v), jax.jit(gradient)(q, k, v), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


def test_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match="'sparse' is unknown; known: dense, blockwise"):
        attend(*random_inputs(4), backend="sparse")


def test_long_rows_never_take_the_dense_backend():
    assert default_backend(LONGEST_DENSE_ROW) == "dense"
    assert default_backend(LONGEST_DENSE_ROW + 1) == default_backend(32_768) == "blockwise"
