"""The Pallas kernel for TPUs: its program run on the CPU, and compiled for TPUs that are not there."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import random_inputs, random_segments, reference
from jax.lax import Precision
from jax.sharding import AxisType, PartitionSpec

from lark_jax.students.attention import splash as module
from lark_jax.students.attention.dispatch import attend
from lark_jax.students.attention.splash import splash_attention

TOKENS_AT_FULL_SIZE = 32_768


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in short rows."""
    monkeypatch.setattr(module, "LARGEST_BLOCK_BY_ROW", ((float("inf"), 128),))


def splash(q, k, v, segments=None):
    return splash_attention(q, k, v, segments, Precision.HIGHEST, interpret=True)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("time", "num_heads", "num_kv_heads", "packed"),
    [(1, 2, 2, False), (7, 4, 1, True), (129, 7, 1, False), (383, 4, 2, True), (513, 2, 2, False)],
)
def test_equals_dense_float64(time, num_heads, num_kv_heads, packed):
    q, k, v = random_inputs(time, num_heads, num_kv_heads, head_dim=10)
    segments = random_segments(time) if packed else None
    out = jax.jit(splash)(q, k, v, None if segments is None else jnp.asarray(segments))
    np.testing.assert_allclose(out, reference(q, k, v, segments), rtol=0, atol=2e-5)


def test_blocks_as_they_are_used_give_the_same():
    q, k, v = random_inputs(600, 2, 1, batch=1)
    np.testing.assert_allclose(jax.jit(splash)(q, k, v), reference(q, k, v), rtol=0, atol=2e-5)


@pytest.mark.usefixtures("small_blocks")
def test_bf16_differs_from_float64_by_bf16_rounding_only():
    q, k, v = (x.astype(jnp.bfloat16) for x in random_inputs(300, 4, 2, head_dim=32, scale=1.0))
    out = jax.jit(splash)(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), reference(q, k, v), rtol=0, atol=0.03)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("time", "num_heads", "num_kv_heads", "packed"), [(7, 2, 2, False), (140, 7, 1, True), (300, 4, 2, False)]
)
def test_gradient_equals_that_of_the_dense_backend(time, num_heads, num_kv_heads, packed):
    q, k, v = random_inputs(time, num_heads, num_kv_heads, scale=1.0)
    segments = jnp.asarray(random_segments(time)) if packed else None
    cotangent = jnp.asarray(np.random.default_rng().normal(size=q.shape), jnp.float32)
    dense = functools.partial(attend, segment_ids=segments, backend="dense")

    def gradients(attention):
        return jax.jit(jax.grad(lambda *qkv: (attention(*qkv) * cotangent).sum(), argnums=(0, 1, 2)))(q, k, v)

    for ours, expected in zip(gradients(lambda *qkv: splash(*qkv, segments)), gradients(dense), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max() + 1))


@pytest.mark.usefixtures("small_blocks")
def test_what_stands_after_a_token_does_not_change_it():
    q, k, v = random_inputs(200, 2, 1)
    changed = [jnp.concatenate([x[:, :150], 9.0 + x[:, 150:]], axis=1) for x in (q, k, v)]
    attention = jax.jit(splash)
    np.testing.assert_array_equal(attention(q, k, v)[:, :150], attention(*changed)[:, :150])


@pytest.mark.usefixtures("small_blocks")
def test_works_inside_shard_map():
    """Under scan and rematerialization, as the decoder calls it."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    q, k, v = random_inputs(140, scale=1.0)
    segments = jnp.asarray(random_segments(140))

    def loss(q, k, v, segments):
        def block(carry_bthd, _):
            return carry_bthd + splash(carry_bthd, k, v, segments), None

        return (jax.lax.scan(jax.checkpoint(block), q, length=2)[0] ** 2).sum()

    rows = PartitionSpec("data")
    value_and_gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))

    def local(*arrays):
        value, gradients = value_and_gradient(*arrays)
        return value[None], gradients

    sharded = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    value, gradients = jax.jit(sharded)(q, k, v, segments)
    expected_value, expected_gradients = jax.jit(value_and_gradient)(q, k, v, segments)
    np.testing.assert_allclose(value.sum(), expected_value, rtol=1e-5)
    for ours, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


def test_float32_is_refused_with_the_backends_that_compute_it():
    with pytest.raises(ValueError, match=r"'splash' computes in bfloat16, not float32; these can: dense, blockwise$"):
        attend(*random_inputs(4), backend="splash")


@pytest.mark.parametrize("time", [*range(1, 2_000, 61), 8_191, 8_192, 8_193, 20_001, 32_768, 32_769, 131_072])
def test_blocks_are_large_and_pad_little(time):
    block = module._block_size(time)
    padded = -(-time // block) * block
    assert block % 128 == 0
    largest = 512 if time <= 8_192 else 1_024
    assert min(time, largest // 2) <= block <= largest
    assert padded - time < min(largest // 2, max(time, 128))


COMPILE = f"""
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from lark_jax.students.attention.dispatch import attend

devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
head_dim, packed = int(sys.argv[2]), sys.argv[3] == "packed"
mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
rows = PartitionSpec("data")

def loss(q, k, v, segments):
    out = attend(q, k, v, segment_ids=segments if packed else None, backend="splash")
    return (out.astype(jnp.float32) ** 2).sum()

def argument(*shape, dtype=jnp.bfloat16):
    sharding = NamedSharding(mesh, rows)
    return jax.ShapeDtypeStruct((len(devices), {TOKENS_AT_FULL_SIZE}, *shape), dtype, sharding=sharding)

arguments = [argument(heads, head_dim) for heads in (28, 4, 4)] + [argument(dtype=jnp.int32)]
gradient = jax.grad(loss, argnums=(0, 1, 2))
gradient = jax.shard_map(gradient, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
compiled = jax.jit(gradient).lower(*arguments).compile()
print(json.dumps([compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (extra `test`) is not installed")
@pytest.mark.parametrize(
    ("topology", "head_dim", "packed"),
    [("v5e:2x2", 128, "packed"), ("v5p:2x2x1", 128, "rows"), ("v6e:2x2", 64, "rows")],
)
def test_compiles_forward_and_backward_for_tpus_at_full_length(topology, head_dim, packed):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no TPU to ask
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, topology, str(head_dim), packed],
        cwd=Path(__file__).resolve().parents[3],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    temporary_bytes, program = json.loads(done.stdout.splitlines()[-1])
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{kernel}{'_segmented' * (packed == 'packed')}" in program
    # A few copies of q (256 MiB at head_dim 128) at most; the scores would take 112 GiB.
    assert temporary_bytes < 1.3 * 2**30
