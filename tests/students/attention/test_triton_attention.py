"""The Pallas kernel for GPUs lowers to Triton, for CUDA without a GPU."""

import re

import jax
import jax.numpy as jnp
import pytest

from lark_jax.students.attention.dispatch import attend


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
