"""The backends in plain jnp against a dense float64 NumPy reference, and the choice among all of them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import random_inputs, random_segments, reference
from jax.sharding import AxisType, PartitionSpec

from lark_jax.config import ATTENTION_BACKENDS
from lark_jax.errors import ConfigError
from lark_jax.students.attention import blockwise as blockwise_attention
from lark_jax.students.attention import dispatch as attention
from lark_jax.students.attention.dispatch import (
    BACKENDS,
    LONGEST_DENSE_ROW,
    LONGEST_DENSE_ROW_BESIDE_KERNELS,
    attend,
    default_backend,
    describe_backend,
    kernel_platform,
)

BLOCK = 32
PORTABLE = ("blockwise", "dense")


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in short rows."""
    monkeypatch.setattr(blockwise_attention, "LARGEST_BLOCK", BLOCK)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("backend", PORTABLE)
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
@pytest.mark.parametrize("backend", PORTABLE)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (3, 3), (6, 2), (5, 1), (8, 4)])
def test_query_heads_share_key_heads_in_order(backend, num_heads, num_kv_heads):
    q, k, v = random_inputs(BLOCK + 1, num_heads, num_kv_heads)
    np.testing.assert_allclose(attend(q, k, v, backend=backend), reference(q, k, v), rtol=0, atol=2e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("backend", PORTABLE)
def test_bf16_differs_from_float64_by_bf16_rounding_only(backend):
    q, k, v = (x.astype(jnp.bfloat16) for x in random_inputs(5 * BLOCK - 3, 4, 2))
    out = attend(q, k, v, backend=backend)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), reference(q, k, v), rtol=0, atol=0.06)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("backend", PORTABLE)
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


@pytest.mark.usefixtures("small_blocks")
def test_blockwise_skips_blocks_of_other_segments():
    """Numbers that are not finite would spoil a sum even with weight zero; in a block that is skipped they cannot."""
    time = 6 * BLOCK
    q, k, v = random_inputs(time, batch=1)
    segments = np.repeat([[1, 2, 3]], 2 * BLOCK, axis=1)  # the edges of segments are those of blocks
    clean = attend(q, k, v, segment_ids=jnp.asarray(segments), backend="blockwise")
    spoilt = [x.at[:, 2 * BLOCK : 4 * BLOCK].set(jnp.nan) for x in (q, k, v)]

    def total_of_others(q, k, v):
        out = attend(q, k, v, segment_ids=jnp.asarray(segments), backend="blockwise")
        others = jnp.concatenate([out[:, : 2 * BLOCK], out[:, 4 * BLOCK :]], axis=1)
        return (others**2).sum(), others

    (_, others), gradients = jax.value_and_grad(total_of_others, argnums=(0, 1, 2), has_aux=True)(*spoilt)
    np.testing.assert_array_equal(others[:, : 2 * BLOCK], clean[:, : 2 * BLOCK])
    np.testing.assert_array_equal(others[:, 2 * BLOCK :], clean[:, 4 * BLOCK :])
    for gradient in gradients:
        assert np.isfinite(np.delete(gradient, np.arange(2 * BLOCK, 4 * BLOCK), axis=1)).all()


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
@pytest.mark.parametrize("backend", PORTABLE)
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


def test_the_configuration_knows_every_backend():
    assert set(BACKENDS) == set(ATTENTION_BACKENDS)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("head_dim", [16, 60, 64, 128, 192])
@pytest.mark.parametrize("packed", [False, True])
def test_the_default_can_compute_what_it_is_asked_for(platform, dtype, head_dim, packed):
    for length in (1, 128, 129, 256, 257, 32_768):
        backend = default_backend(length, platform, dtype, head_dim, packed=packed)
        assert BACKENDS[backend].refusal(jnp.dtype(dtype), head_dim, packed) is None
        assert (
            backend in {"cpu": PORTABLE, "gpu": (*PORTABLE, "cudnn", "triton"), "tpu": (*PORTABLE, "splash")}[platform]
        )
        assert backend != "dense" or length <= LONGEST_DENSE_ROW


def test_long_bf16_rows_take_the_kernel_of_the_platform():
    def chosen(platform, dtype=jnp.bfloat16, length=32_768):
        return default_backend(length, platform, dtype, 128)

    assert [chosen(platform) for platform in ("cpu", "gpu", "tpu")] == ["blockwise", "cudnn", "splash"]
    assert [chosen(platform, jnp.float32) for platform in ("cpu", "gpu", "tpu")] == ["blockwise"] * 3
    short = LONGEST_DENSE_ROW_BESIDE_KERNELS
    assert [chosen(platform, length=short) for platform in ("cpu", "gpu", "tpu")] == ["dense"] * 3
    assert [chosen(platform, length=short + 1) for platform in ("cpu", "gpu", "tpu")] == ["dense", "cudnn", "splash"]


def test_the_tpu_kernel_is_not_chosen_where_the_compiler_would_have_to_partition_it(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    called = {"outside": [], "inside": []}

    def record(where, name):
        return BACKENDS[name]._replace(attention=lambda q, *_: called[where].append(name) or q)

    q, k, v = (x.astype(jnp.bfloat16) for x in random_inputs(300, batch=8))
    monkeypatch.setattr(attention, "BACKENDS", {name: record("outside", name) for name in BACKENDS})
    jax.eval_shape(attend, q, k, v)
    monkeypatch.setattr(attention, "BACKENDS", {name: record("inside", name) for name in BACKENDS})
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    jax.eval_shape(jax.shard_map(attend, mesh=mesh, in_specs=rows, out_specs=rows), q, k, v)
    assert called == {"outside": ["blockwise"], "inside": ["splash"]}


def test_the_choice_is_described_for_the_log():
    line = describe_backend(None, [16_384, 64, 128, 512], "gpu", jnp.bfloat16, 128)
    assert line == "attention: dense (rows of 64 to 128 tokens), cudnn (rows of 512 to 16,384 tokens)"
    assert describe_backend("blockwise", [64, 512], "gpu", jnp.float32, 128) == "attention: blockwise"
    assert describe_backend(None, [512], "cpu", jnp.bfloat16, 64) == "attention: blockwise (rows of 512 tokens)"


def test_packed_rows_take_a_kernel_that_honours_segments_or_else_plain_jnp():
    def described(platform, backend=None):
        return describe_backend(backend, [128, 4_096], platform, jnp.bfloat16, 128, packed=True)

    assert described("tpu") == "attention: dense (packed rows of 128 tokens), splash (packed rows of 4,096 tokens)"
    assert described("gpu") == "attention: dense (packed rows of 128 tokens), triton (packed rows of 4,096 tokens)"
    assert described("gpu", "blockwise") == "attention: blockwise"
    with pytest.raises(ConfigError, match="'cudnn' does not honour segment ids; use 'auto' or 'blockwise'"):
        described("gpu", "cudnn")


@pytest.mark.parametrize(
    ("backend", "platform", "dtype", "head_dim", "message"),
    [
        ("cudnn", "tpu", jnp.bfloat16, 128, "'cudnn' runs on gpu, not on tpu"),
        ("splash", "cpu", jnp.bfloat16, 128, "'splash' runs on tpu, not on cpu"),
        ("cudnn", "gpu", jnp.float32, 128, "'cudnn' computes in bfloat16 or float16, not float32"),
        ("cudnn", "gpu", jnp.bfloat16, 192, "multiple of 8 up to 128, not 192"),
        ("splash", "tpu", jnp.float32, 128, "'splash' computes in bfloat16, not float32"),
    ],
)
def test_a_configured_backend_that_cannot_run_is_refused_in_one_line(backend, platform, dtype, head_dim, message):
    with pytest.raises(ConfigError, match=message) as error:
        describe_backend(backend, [512], platform, dtype, head_dim)
    assert "\n" not in str(error.value)
    assert "'blockwise'" in str(error.value)


@pytest.mark.parametrize(
    ("capability", "kernels"), [("8.0", "gpu"), ("9.0", "gpu"), ("10.0", "gpu"), ("7.5", "cpu"), ("gfx90a", "cpu")]
)
def test_gpus_without_flash_kernels_count_as_a_platform_without(capability: str, kernels: str) -> None:
    device = SimpleNamespace(platform="gpu", compute_capability=capability)
    assert kernel_platform(device) == kernels
    assert kernel_platform(jax.devices()[0]) == "cpu"
    assert kernel_platform(SimpleNamespace(platform="tpu")) == "tpu"
