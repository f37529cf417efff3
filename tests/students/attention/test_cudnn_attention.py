"""What reaches cuDNN, seen in the program lowered for CUDA on any machine."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from attention_base import random_inputs
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AxisType, PartitionSpec

from lark_jax.errors import ConfigError
from lark_jax.students.attention.dispatch import attend
from lark_jax.students.remat import LAYER_INPUT, named, rematerialized


@pytest.fixture
def cudnn_installed(monkeypatch):
    """Lowering asks only for a version."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


attention = functools.partial(attend, backend="cudnn")


def gradients(q, k, v, **options):
    return jax.grad(lambda *qkv: (attention(*qkv, **options).astype(jnp.float32) ** 2).sum(), argnums=(0, 1, 2))(
        q, k, v
    )


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
@pytest.mark.parametrize(("window", "length"), [(1, 1), (100, 100), (383, 0), (None, 0)])
def test_cudnn_gets_scale_and_window_forward_and_backward(window, length):
    """cuDNN counts the query itself, as `attend` does; 0 is no window."""
    calls = cudnn_calls(functools.partial(gradients, window=window, scale=0.3), 383, 8, 2)
    assert [target for target, _ in calls] == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    for _, call in calls:
        assert re.search(r"mask_type\\22: \\22CAUSAL\\22", call)
        assert int(re.search(r"sliding_window_length\\22: (\d+)", call).group(1)) == length
        assert float(re.search(r"fmha_scale\\22: ([\d.e-]+)", call).group(1)) == 0.3


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


def test_a_jax_without_cudnn_is_named_in_one_line(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", None)
    with pytest.raises(ConfigError, match=r"this JAX has no cuDNN; install lark_jax\[gpu\]"):
        attention(*(x.astype(jnp.bfloat16) for x in random_inputs(8, head_dim=64)))
