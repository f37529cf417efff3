"""cuDNN attention: what reaches cuDNN, seen in the program lowered for CUDA on any machine; its numbers, on a GPU."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from attention_reference import random_inputs, random_segments
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AxisType, PartitionSpec

from lark_jax.errors import ConfigError
from lark_jax.students.attention.dispatch import attend
from lark_jax.students.remat import LAYER_INPUT, named, rematerialized

HAS_GPU = shutil.which("nvidia-smi") is not None and any(
    importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)
)


@pytest.fixture
def cudnn_installed(monkeypatch):
    """Lowering asks only for a version."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def attention(q, k, v):
    return attend(q, k, v, backend="cudnn")


def gradients(q, k, v):
    return jax.grad(lambda *qkv: (attention(*qkv).astype(jnp.float32) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)


def cudnn_calls(function, time, num_heads, num_kv_heads, batch=2, dtype=jnp.bfloat16):
    """(target, text) of every call of cuDNN in the program for CUDA."""
    arguments = [jax.ShapeDtypeStruct((batch, time, heads, 64), dtype) for heads in (num_heads, *[num_kv_heads] * 2)]
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"custom_call @__cudnn\$(\w+)(.*)", program)


@pytest.mark.usefixtures("cudnn_installed")
@pytest.mark.parametrize(("time", "padded"), [(1, 2), (7, 8), (129, 130), (512, 512)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 2), (14, 2)])
def test_cudnn_gets_a_causal_mask_and_unrepeated_keys(time, padded, num_heads, num_kv_heads):
    ((target, call),) = cudnn_calls(attention, time, num_heads, num_kv_heads)
    assert target == "fmhaSoftmax"
    assert re.search(r"mask_type\\22: \\22CAUSAL\\22", call)
    assert float(re.search(r"fmha_scale\\22: ([\d.e-]+)", call).group(1)) == 0.125
    q, k = (f"tensor<2x{padded}x{heads}x64xbf16>" for heads in (num_heads, num_kv_heads))
    assert f"({q}, {k}, {k}) -> " in call


@pytest.mark.usefixtures("cudnn_installed")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_backward_pass_is_cudnns_too_at_odd_lengths_and_inside_shard_map(dtype):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows = PartitionSpec("data")
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=rows, out_specs=rows)
    for function in (gradients, sharded):
        targets = [target for target, _ in cudnn_calls(function, 383, 14, 2, dtype=dtype)]
        assert targets == ["fmhaSoftmax", "fmhaSoftmaxBackward"]


@pytest.mark.usefixtures("cudnn_installed")
@pytest.mark.parametrize(("remat", "forward_passes"), [("none", 1), ("attention", 1), ("block", 2), ("offload", 2)])
def test_with_its_output_kept_cudnns_forward_pass_does_not_run_again(remat, forward_passes):
    """The policy knows it by the name of JAX's primitive, which is no public name: other releases may have another."""

    def layer(x, weight):
        q, k = named(x, LAYER_INPUT) * weight, x[:, :, :2] * weight
        return attend(q, k, k, backend="cudnn") * weight, None

    def loss(x, weights):
        return jax.lax.scan(rematerialized(layer, remat), x, weights)[0].astype(jnp.float32).sum()

    def through_layers(x, _, weights):
        return jax.grad(loss, argnums=(0, 1))(x, weights[0, :3, 0, 0])

    targets = [target for target, _ in cudnn_calls(through_layers, 384, 4, 2)]
    assert sorted(targets) == ["fmhaSoftmax"] * forward_passes + ["fmhaSoftmaxBackward"]


@pytest.mark.usefixtures("cudnn_installed")
@pytest.mark.parametrize(
    ("dtype", "head_dim", "packed", "message"),
    [
        (jnp.float32, 64, False, r"computes in bfloat16 or float16, not float32; these can: dense, blockwise$"),
        (jnp.bfloat16, 60, False, r"multiple of 8 up to 128, not 60; these can: dense, blockwise, splash$"),
        (jnp.bfloat16, 136, False, r"multiple of 8 up to 128, not 136; these can: dense, blockwise, splash$"),
        (jnp.bfloat16, 64, True, r"does not honour segment ids; these can: dense, blockwise, triton, splash$"),
    ],
)
def test_what_cudnn_cannot_compute_is_refused_with_those_that_can(dtype, head_dim, packed, message):
    q, k, v = (x.astype(dtype) for x in random_inputs(8, head_dim=head_dim))
    segments = jnp.asarray(random_segments(8)) if packed else None
    with pytest.raises(ValueError, match=f"'cudnn' .*{message}"):
        attend(q, k, v, segment_ids=segments, backend="cudnn")


def test_a_jax_without_cudnn_is_named_in_one_line(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", None)
    with pytest.raises(ConfigError, match=r"this JAX has no cuDNN; install lark_jax\[gpu\]"):
        attention(*(x.astype(jnp.bfloat16) for x in random_inputs(8, head_dim=64)))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA GPU with JAX's CUDA plugin here")
def test_agrees_with_float64_on_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    script = Path(__file__).with_name("attention_errors.py")
    done = subprocess.run(
        [sys.executable, str(script), "cudnn"],
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
