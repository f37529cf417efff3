"""Properties of every attention backend against a float64 reference, case by case as its flags allow.

The kernels of accelerators run interpreted here, in float32. cuDNN has no such mode: it runs where there is a GPU.
"""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_base import (
    CASES,
    Case,
    inputs_of,
    output_and_gradients,
    published_cases,
    random_inputs,
    random_segments,
    reference,
    supported_cases,
)
from jax.experimental.pallas.ops.gpu.attention import BlockSizes
from jax.sharding import AxisType, PartitionSpec

from lark_jax.students.attention import blockwise, splash, triton
from lark_jax.students.attention.contract import Options
from lark_jax.students.attention.dispatch import BACKENDS, attend

HERE = {
    "dense": BACKENDS["dense"].attention,
    "blockwise": BACKENDS["blockwise"].attention,
    "triton": functools.partial(triton.triton_attention, interpret=True),
    "splash": functools.partial(splash.splash_attention, interpret=True),
}
HAS_GPU = shutil.which("nvidia-smi") is not None and any(
    importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)
)
each_backend = pytest.mark.parametrize("backend", HERE)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in short rows."""
    monkeypatch.setattr(blockwise, "LARGEST_BLOCK", 32)
    monkeypatch.setattr(triton, "BLOCK_SIZES", BlockSizes(*[32] * 6))
    monkeypatch.setattr(splash, "LARGEST_BLOCK_BY_ROW", ((float("inf"), 128),))


@functools.cache
def compiled(backend, case):
    return output_and_gradients(HERE[backend], case)


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(backend, case, id=f"{backend}-{case}")
        for backend in HERE
        for case in supported_cases(backend, (*CASES, *published_cases(150, num_kv_heads=1)))
    ],
)
def test_output_and_gradients_equal_float64(backend, case):
    inputs = inputs_of(case)
    expected = reference(*inputs, scale=case.scale, window=case.window)
    for index, (ours, exact) in enumerate(zip(compiled(backend, case)(*inputs), expected, strict=True)):
        assert ours.dtype == jnp.float32
        output_bound = 2e-5 if case in CASES else 5e-5  # published shapes have wide heads, hence larger scores
        bound = output_bound if index == 0 else 2e-5 * (np.abs(exact).max() + 1)
        np.testing.assert_allclose(ours, exact, rtol=0, atol=bound)


def test_the_reference_gradients_are_finite_differences():
    case = Case(9, 4, 2, head_dim=5, packed=True, scale=0.4, window=4, batch=1)
    *qkv, cotangent, segments = (np.asarray(x, np.float64) for x in inputs_of(case))
    options = {"scale": case.scale, "window": case.window}
    for index, gradient in enumerate(reference(*qkv, cotangent, segments, **options)[1:]):
        direction, values = np.random.default_rng().normal(size=qkv[index].shape), []
        for step in (1e-5, -1e-5):
            moved = [x + step * direction if i == index else x for i, x in enumerate(qkv)]
            values.append((reference(*moved, None, segments, **options)[0] * cotangent).sum())
        np.testing.assert_allclose((gradient * direction).sum(), (values[0] - values[1]) / 2e-5, rtol=1e-5, atol=1e-7)


BF16 = Case(157, 4, 2, head_dim=32)


@each_backend
def test_bf16_differs_from_float64_by_bf16_rounding_only(backend):
    inputs = inputs_of(BF16, "bfloat16")
    for index, (ours, exact) in enumerate(zip(compiled(backend, BF16)(*inputs), reference(*inputs), strict=True)):
        assert ours.dtype == jnp.bfloat16
        bound = 0.06 if index == 0 else 0.015 * np.abs(exact).max()
        np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=0, atol=bound)


FP32 = Case(157, 4, 2)


@each_backend
def test_large_scores_do_not_overflow(backend):
    inputs = [20.0 * x if index < 3 else x for index, x in enumerate(inputs_of(FP32)[:4])]
    out, *gradients = compiled(backend, FP32)(*inputs, None)
    np.testing.assert_allclose(out, reference(*inputs)[0], rtol=0, atol=5e-2)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@each_backend
def test_later_tokens_do_not_change_earlier_outputs(backend):
    q, k, v, cotangent, _ = inputs_of(FP32)
    changed = [jnp.concatenate([x[:, :100], 9.0 + x[:, 100:]], axis=1) for x in (q, k, v)]
    before, after = (compiled(backend, FP32)(*qkv, cotangent, None)[0] for qkv in ((q, k, v), changed))
    np.testing.assert_array_equal(before[:, :100], after[:, :100])
    assert np.abs(np.asarray(before - after)[:, 100:]).max() > 0.1


@each_backend
def test_works_inside_shard_map(backend):
    """Under scan and rematerialization, as the decoder calls it."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    q, k, v = random_inputs(70, head_dim=16, scale=1.0)
    segments = jnp.asarray(random_segments(70))

    def loss(q, k, v, segments):
        def block(carry, _):
            return carry + HERE[backend](carry, k, v, Options(segments)), None

        return (jax.lax.scan(jax.checkpoint(block), q, length=2)[0] ** 2).sum()

    gradients = jax.grad(loss, argnums=(0, 1, 2))
    rows, is_kernel = PartitionSpec("data"), backend in ("splash", "triton")
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=not is_kernel)
    arguments = (q, k, v, segments)
    for ours, expected in zip(jax.jit(sharded)(*arguments), jax.jit(gradients)(*arguments), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
    ("backend", "dtype", "case", "message"),
    [
        ("cudnn", "float32", Case(8, head_dim=64), "computes in bfloat16 or float16, not float32; dense, blockwise"),
        ("cudnn", "bfloat16", Case(8, head_dim=60), "multiple of 8 up to 128, not 60; dense, blockwise, splash"),
        ("cudnn", "bfloat16", Case(8, head_dim=136), "multiple of 8 up to 128, not 136; dense, blockwise, splash"),
        ("cudnn", "float16", Case(8, packed=True), "does not support segment ids; dense, blockwise, triton"),
        ("triton", "float32", Case(8), "computes in bfloat16 or float16, not float32; dense, blockwise"),
        ("triton", "bfloat16", Case(8, head_dim=96), "of 16, 32, 64, 128, not 96; dense, blockwise, cudnn, splash"),
        ("triton", "bfloat16", Case(8, window=7), "does not support a sliding window; dense, blockwise, cudnn, splash"),
        ("splash", "float32", Case(8), "computes in bfloat16, not float32; dense, blockwise"),
    ],
)
def test_what_a_backend_cannot_compute_is_refused_with_those_that_can(backend, dtype, case, message):
    *qkv, _, segments = inputs_of(case, dtype)
    with pytest.raises(ValueError, match=f"^attention backend '{backend}' ") as error:
        attend(*qkv, segment_ids=segments, window=case.window, backend=backend)
    reason, able = message.split("; ")
    assert str(error.value).endswith(f"{reason}; these can: {able}")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA GPU with JAX's CUDA plugin here")
@pytest.mark.parametrize("backend", ["cudnn", "triton"])
def test_agrees_with_float64_on_a_gpu(backend):
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    script = Path(__file__).with_name("attention_errors.py")
    done = subprocess.run(
        [sys.executable, str(script), backend],
        cwd=Path(__file__).resolve().parents[3],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    for line in done.stdout.splitlines():
        errors = json.loads(line)
        assert errors["platform"] == "gpu"
        assert errors["out"] < 4 * errors["epsilon"], errors
        assert errors["gradient"] < 8 * errors["epsilon"], errors
