"""The layout of the student's parameters: what was asked for, else what fits; heads are never cut."""

import math

import jax
import pytest

from lark_jax.config import MeshConfig
from lark_jax.errors import ConfigError
from lark_jax.runtime.sharding import DATA, TENSOR, make_mesh
from lark_jax.scoring.parameter_axes import (
    check_tensor_axis,
    choose_parameter_axes,
    parameter_bytes_per_device,
    smallest_device_memory,
)
from lark_jax.students.architecture import Architecture, architecture_from_config
from lark_jax.students.parameters import parameter_shapes

GIB = 1 << 30
# Qwen2.5-7B: 7,615,616,512 parameters, 14.19 GiB in bfloat16.
SEVEN_B = architecture_from_config(
    {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3_584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32_768,
    }
)


def _choice(
    memory: int | None, tensor: int = 1, requested: str = "auto", dtype: str = "bfloat16", devices: int = 8
) -> tuple[str, ...]:
    mesh = make_mesh(MeshConfig(tensor=tensor), jax.devices()[:devices])
    return choose_parameter_axes(SEVEN_B, mesh, dtype, requested, memory)


@pytest.mark.parametrize(
    ("memory_gib", "tensor", "dtype", "expected"),
    [
        (80, 1, "bfloat16", ()),
        (40, 1, "bfloat16", ()),
        (28, 1, "bfloat16", (DATA,)),  # half of it is 14 GiB
        (16, 1, "bfloat16", (DATA,)),
        (40, 1, "float32", (DATA,)),
        (16, 2, "bfloat16", (TENSOR,)),
        (14, 2, "bfloat16", (DATA, TENSOR)),
        (16, 4, "bfloat16", (TENSOR,)),
        (None, 1, "float32", ()),
        (None, 2, "float32", (TENSOR,)),
    ],
)
def test_parameters_are_replicated_where_they_take_half_a_device_at_most(
    memory_gib: int | None, tensor: int, dtype: str, expected: tuple[str, ...]
) -> None:
    memory = None if memory_gib is None else memory_gib * GIB
    assert _choice(memory, tensor, dtype=dtype) == expected


@pytest.mark.parametrize("memory", [None, 4 * GIB, 1_000 * GIB])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_what_was_asked_for_is_taken_whatever_fits(memory: int | None, tensor: int) -> None:
    over_tensor = (TENSOR,) if tensor > 1 else ()
    assert _choice(memory, tensor, "replicated") == over_tensor
    assert _choice(memory, tensor, "gathered") == (DATA, *over_tensor)


def test_one_device_has_nothing_to_split_over() -> None:
    assert _choice(GIB, devices=1) == _choice(GIB, requested="gathered", devices=1) == ()
    assert _choice(GIB, tensor=2, requested="gathered", devices=2) == (TENSOR,)


def test_bytes_of_a_device() -> None:
    mesh = make_mesh(MeshConfig(tensor=2))
    total = 2 * sum(math.prod(shape) for shape in parameter_shapes(SEVEN_B).values())
    assert total == 2 * 7_615_616_512
    assert parameter_bytes_per_device(SEVEN_B, mesh, "bfloat16", ()) == total
    small = total / 1_000  # norms and biases stay whole
    assert total / 2 <= parameter_bytes_per_device(SEVEN_B, mesh, "bfloat16", (TENSOR,)) < total / 2 + small
    assert total / 8 <= parameter_bytes_per_device(SEVEN_B, mesh, "bfloat16", (DATA, TENSOR)) < total / 8 + small


@pytest.mark.parametrize(("kv_heads", "divisors"), [(1, "1"), (4, "1, 2, 4"), (6, "1, 2, 3, 6")])
def test_a_tensor_axis_that_would_cut_heads_is_refused_with_the_divisors(kv_heads: int, divisors: str) -> None:
    architecture = _with_kv_heads(kv_heads)
    mesh = make_mesh(MeshConfig(tensor=8))
    for refuse in (
        lambda: check_tensor_axis(architecture, mesh),
        lambda: choose_parameter_axes(architecture, mesh, "bfloat16", "auto", None),
    ):
        with pytest.raises(ConfigError, match=rf"mesh\.tensor: .* {kv_heads} key-value heads \({divisors}\), got 8$"):
            refuse()
    check_tensor_axis(_with_kv_heads(8), mesh)


def _with_kv_heads(kv_heads: int) -> Architecture:
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "head_dim": 8}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 24, "num_key_value_heads": kv_heads}
    return architecture_from_config(config)


class _Device:
    def __init__(self, stats: dict[str, int] | None) -> None:
        self.memory_stats = lambda: stats


def test_memory_is_that_of_the_smallest_device_and_unknown_where_none_says() -> None:
    assert smallest_device_memory(jax.devices()) is None
    assert smallest_device_memory([_Device(None), _Device({"bytes_in_use": 3})]) is None  # type: ignore[arg-type]
    assert smallest_device_memory([_Device({"bytes_limit": 7}), _Device({"bytes_limit": 5})]) == 5  # type: ignore[arg-type]
