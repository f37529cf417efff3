"""The Pallas kernel for GPUs: its numbers, interpreted on the CPU; that it lowers to Triton, for CUDA without a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import random_inputs, random_segments, reference
from jax.experimental.pallas.ops.gpu.attention import BlockSizes
from jax.lax import Precision

from lark_jax.students.attention import triton as module
from lark_jax.students.attention.dispatch import attend, default_backend

BLOCK = 32


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """Several blocks in short rows; lowering takes the real ones."""
    if "lowers" not in request.node.name:
        monkeypatch.setattr(module, "BLOCK_SIZES", BlockSizes(*[BLOCK] * 6))


def interpreted(q, k, v, segment_ids=None):
    return module.triton_attention(q, k, v, segment_ids, Precision.HIGHEST, interpret=True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("time", "num_heads", "num_kv_heads"), [(1, 1, 1), (BLOCK, 2, 1), (BLOCK + 1, 6, 2), (77, 7, 1)]
)
def test_equals_dense_float64_at_any_length_and_grouping(time, num_heads, num_kv_heads, packed):
    q, k, v = random_inputs(time, num_heads, num_kv_heads, head_dim=16)
    segments = random_segments(time) if packed else None
    out = jax.jit(interpreted)(q, k, v, None if segments is None else jnp.asarray(segments))
    np.testing.assert_allclose(out, reference(q, k, v, segments), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("time", "num_heads", "num_kv_heads"), [(7, 2, 2), (75, 4, 2)])
def test_gradient_of_packed_rows_equals_that_of_the_dense_backend(time, num_heads, num_kv_heads):
    q, k, v = random_inputs(time, num_heads, num_kv_heads, head_dim=16, scale=1.0)
    segments = jnp.asarray(random_segments(time))
    cotangent = jnp.asarray(np.random.default_rng().normal(size=q.shape), jnp.float32)
    dense = functools.partial(attend, segment_ids=segments, backend="dense")

    def gradients(attention):
        return jax.jit(jax.grad(lambda *qkv: (attention(*qkv) * cotangent).sum(), argnums=(0, 1, 2)))(q, k, v)

    ours = gradients(functools.partial(interpreted, segment_ids=segments))
    for found, expected in zip(ours, gradients(dense), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max() + 1))


@pytest.mark.parametrize(("dtype", "head_dim"), [(jnp.bfloat16, 128), (jnp.float16, 64)])
def test_packed_rows_of_odd_length_lowers_forward_and_backward_to_triton(dtype, head_dim):
    def loss(q, k, v, segments):
        return attend(q, k, v, segment_ids=segments, backend="triton").astype(jnp.float32).sum()

    arguments = [jax.ShapeDtypeStruct((2, 383, heads, head_dim), dtype) for heads in (4, 2, 2)]
    arguments.append(jax.ShapeDtypeStruct((2, 383), jnp.int32))
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    try:
        program = gradient.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:  # JAX 0.12 looks for a GPU
        if "No supported GPU devices found" not in str(error):
            raise
        pytest.skip("this JAX lowers Triton kernels for GPUs that are there, or named by a mesh of absent ones")
    assert program.count("custom_call @__gpu$xla.gpu.triton") == 3
    kernels = set(re.findall(r'name = "(mha_\w+)"', program))
    assert kernels == {"mha_forward", "mha_preprocess_backward", "mha_backward"}


@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [
        (jnp.float32, 64, r"computes in bfloat16 or float16, not float32; these can: dense, blockwise$"),
        (jnp.bfloat16, 96, r"head_dim of 16, 32, 64, 128, not 96; these can: dense, blockwise, splash$"),
    ],
)
def test_what_the_kernel_cannot_compute_is_refused_with_those_that_can(dtype, head_dim, message):
    q, k, v = (x.astype(dtype) for x in random_inputs(8, head_dim=head_dim))
    with pytest.raises(ValueError, match=f"'triton' .*{message}"):
        attend(q, k, v, segment_ids=jnp.asarray(random_segments(8)), backend="triton")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "packed", "backend"),
    [
        (jnp.bfloat16, 128, True, "triton"),
        (jnp.bfloat16, 128, False, "cudnn"),
        (jnp.bfloat16, 96, True, "blockwise"),
        (jnp.float32, 128, True, "blockwise"),
    ],
)
def test_gpus_take_it_for_packed_rows_alone_where_it_can(dtype, head_dim, packed, backend):
    assert default_backend(4_096, "gpu", dtype, head_dim, packed=packed) == backend
