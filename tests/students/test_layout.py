"""The layout of a student: what was asked for, else what fits; one process's devices if the student fits them."""

import jax
import pytest

from lark_jax.config import MeshConfig
from lark_jax.errors import ConfigError
from lark_jax.runtime.sharding import DATA, TENSOR, make_mesh
from lark_jax.students.architecture import Architecture, architecture_from_config
from lark_jax.students.layout import (
    REPLICATED_SHARE,
    bytes_per_device,
    choose_parameter_axes,
    fits_one_process,
    smallest_device_memory,
)
from lark_jax.students.parameters import abstract_decoder
from lark_jax.students.sharded import ShardedStudent, check_tensor_axis

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
    mesh, structure = make_mesh(MeshConfig(tensor=2)), abstract_decoder(SEVEN_B, "bfloat16", "bfloat16")
    total = 2 * 7_615_616_512
    small = total / 1_000  # norms and biases stay whole
    for axes, ways in ((), 1), ((TENSOR,), 2), ((DATA, TENSOR), 8):
        held = bytes_per_device(ShardedStudent.abstract(structure, mesh, axes).parameters)
        assert total / ways <= held < total / ways + small * (ways > 1) + 1


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


EIGHT_HEADS = {"model_type": "qwen2", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
EIGHT_HEADS |= {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "rms_norm_eps": 1e-6}
SMALL = architecture_from_config({**EIGHT_HEADS, "max_position_embeddings": 64, "tie_word_embeddings": True})
WHOLE = 4 * 115_392  # bytes of its parameters


def _fits(config: MeshConfig, memory: float | None, own: int = 4, requested: str = "auto") -> bool:
    """Whether SMALL fits `own` of 8 devices, each with so much memory for parameters."""
    device_memory_bytes = None if memory is None else int(memory / REPLICATED_SHARE)
    devices = {"local": jax.devices()[:own], "everywhere": jax.devices()}
    return fits_one_process(SMALL, config, "float32", requested, **devices, device_memory_bytes=device_memory_bytes)


@pytest.mark.parametrize(
    ("config", "memory", "expected"),
    [
        (MeshConfig(), None, True),
        (MeshConfig(), WHOLE + 1, True),
        (MeshConfig(), 0.5 * WHOLE, True),  # split over the process's own devices
        (MeshConfig(tensor=4), 0.5 * WHOLE, True),
        (MeshConfig(), 0.2 * WHOLE, False),
        (MeshConfig(tensor=4), 0.2 * WHOLE, False),
    ],
)
def test_a_process_needs_the_others_only_if_its_own_devices_cannot_hold_the_student(
    config: MeshConfig, memory: float | None, expected: bool
) -> None:
    assert bytes_per_device(ShardedStudent.abstract(abstract_decoder(SMALL), make_mesh(config), ()).parameters) == WHOLE
    assert _fits(config, memory) == expected


def test_replicated_parameters_gain_nothing_from_more_devices() -> None:
    assert _fits(MeshConfig(), 1, requested="replicated")


def test_a_tensor_axis_wider_than_the_own_devices_takes_the_devices_of_all() -> None:
    assert not _fits(MeshConfig(tensor=8), None)
    assert not _fits(MeshConfig(tensor=2), None, own=1)


@pytest.mark.parametrize(("data", "tensor", "expected"), [(4, 1, True), (2, 2, True), (8, 1, False), (4, 2, False)])
def test_explicit_axes_decide_which_devices_are_meant(data: int, tensor: int, expected: bool) -> None:
    assert _fits(MeshConfig(data=data, tensor=tensor), 1) == expected


def test_one_process_always_fits_itself() -> None:
    assert _fits(MeshConfig(tensor=8), 1, own=8)
