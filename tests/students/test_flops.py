"""Analytic FLOPs against a count by hand and against XLA's own."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.students import Decoder
from lark_jax.students.architecture import Architecture, RopeScaling
from lark_jax.students.flops import (
    adapter_parameter_count,
    attention_flops,
    forward_flops,
    parameter_count,
    peak_flops,
    training_flops,
)
from lark_jax.students.lora import Lora, is_factor
from lark_jax.students.parameters import abstract_decoder, shapes_of

QWEN_7B = Architecture(
    model_type="qwen2",
    vocab_size=152_064,
    hidden_size=3_584,
    intermediate_size=18_944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling=RopeScaling(),
    max_position_embeddings=32_768,
    tie_word_embeddings=False,
    attention_bias=True,
    qk_norm=False,
)
# Wide enough that matrix products dominate.
SMALL = dataclasses.replace(
    QWEN_7B,
    vocab_size=640,
    hidden_size=128,
    intermediate_size=384,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
)


def test_qwen2_5_7b_by_hand():
    layer = 3584 * (3584 + 512 + 512 + 3584) + 3 * 3584 * 18944
    head = 3584 * 152064
    triangle = 1 + 2 + 3
    expected = 3 * 2 * (28 * layer + head) + 28 * 28 * 128 * 2 * 2 * triangle
    assert forward_flops(QWEN_7B, 3) == expected
    assert forward_flops(QWEN_7B, 3, vocab=False) == expected - 3 * 2 * head


def test_qwen2_5_7b_has_the_published_number_of_parameters():
    assert parameter_count(QWEN_7B) == 7_615_616_512  # the sum over Qwen/Qwen2.5-7B's safetensors


def test_an_adapter_has_the_parameters_of_the_decoder_and_spares_the_gradients_of_the_weights():
    """By hand: attention three times, the products with weights twice, those with A and B three times."""
    lora, length = Lora(8, 16.0, ("k_proj", "o_proj", "down_proj")), 1_000
    factors = [
        math.prod(shape) for name, shape in shapes_of(abstract_decoder(QWEN_7B, lora=lora)).items() if is_factor(name)
    ]
    assert adapter_parameter_count(QWEN_7B, lora) == sum(factors) == 28 * 8 * ((3584 + 512) + 2 * 3584 + (3584 + 18944))
    attention, adapter = attention_flops(QWEN_7B, length), 2 * length * sum(factors)
    weights = forward_flops(QWEN_7B, length) - attention
    without_remat = 3 * attention + 2 * weights + 3 * adapter
    assert training_flops(QWEN_7B, length, "none", lora) == pytest.approx(without_remat)
    assert training_flops(QWEN_7B, length, "block", lora) == pytest.approx(
        without_remat + attention + weights + adapter
    )
    assert training_flops(QWEN_7B, length, "attention", lora) == pytest.approx(without_remat + weights + adapter)


@given(st.integers(1, 5_000), st.one_of(st.none(), st.integers(1, 6_000)))
def test_causal_attention_costs_what_its_tokens_cost_one_by_one(length: int, window: int | None):
    one_by_one = sum(2 * 2 * 28 * 28 * 128 * min(token + 1, window or length) for token in range(length))
    assert attention_flops(dataclasses.replace(QWEN_7B, sliding_window=window), length) == one_by_one


@pytest.mark.parametrize("length", [96, 160])
def test_xla_counts_the_same_for_an_unrolled_dense_model(length: int):
    """XLA counts the square that dense attention computes, and a few per cent of element-wise work on top."""
    decoder = Decoder(SMALL, rngs=nnx.Rngs(0), attention_backend="dense")
    graph, state = nnx.split(decoder)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    forward = jax.jit(lambda state, tokens_bt: nnx.merge(graph, state).logits(tokens_bt))
    counted = forward.lower(state, tokens).compile().cost_analysis()["flops"]
    upper_triangle = 4 * SMALL.num_heads * SMALL.head_dim * (length**2 - length * (length + 1) / 2)
    assert counted == pytest.approx(forward_flops(SMALL, length) + upper_triangle, rel=0.05)


@pytest.mark.parametrize(
    ("device_kind", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_peaks_of_devices_as_jax_calls_them(device_kind: str, teraflops: float):
    assert peak_flops(device_kind) == teraflops * 1e12


def test_an_unknown_device_has_no_peak():
    assert peak_flops("cpu") is None
