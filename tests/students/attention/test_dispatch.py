"""Which backend `attend` chooses, what the log says about it, and what is refused."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from attention_base import random_inputs
from jax.sharding import AxisType, PartitionSpec

from lark_jax.config import ATTENTION_BACKENDS
from lark_jax.errors import ConfigError
from lark_jax.students.attention import dispatch
from lark_jax.students.attention.contract import AttentionSpec
from lark_jax.students.attention.dispatch import (
    BACKENDS,
    LONGEST_DENSE_ROW,
    LONGEST_DENSE_ROW_WITH_KERNELS,
    attend,
    default_backend,
    describe_backend,
    kernel_platform,
)

PORTABLE = ("blockwise", "dense")


def spec_of(dtype=jnp.bfloat16, head_dim=128, **options):
    return AttentionSpec(jnp.dtype(dtype), head_dim, **options)


@pytest.mark.parametrize(("name", "value"), [("window", 0), ("scale", 0.0), ("scale", -1.0)])
def test_a_scale_or_window_that_is_not_positive_is_refused(name, value):
    with pytest.raises(ValueError, match=f"attention {name}={value}: expected a positive number"):
        attend(*random_inputs(4), **{name: value})


def test_a_window_that_covers_the_row_is_the_program_without_one():
    def program(window, backend):
        return str(jax.make_jaxpr(lambda *qkv: attend(*qkv, window=window, backend=backend))(*random_inputs(40)))

    for backend in PORTABLE:
        assert program(40, backend) == program(None, backend) != program(39, backend)


def test_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match="'sparse' is unknown; known: dense, blockwise"):
        attend(*random_inputs(4), backend="sparse")


def test_the_configuration_knows_every_backend():
    assert set(BACKENDS) == set(ATTENTION_BACKENDS)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("head_dim", [16, 60, 64, 128, 192])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 200])
def test_the_default_can_compute_what_it_is_asked_for(platform, dtype, head_dim, packed, window):
    spec = spec_of(dtype, head_dim, packed=packed, window=window)
    for length in (1, 128, 129, 256, 257, 32_768):
        backend = default_backend(length, platform, spec)
        assert BACKENDS[backend].refusal(spec.for_rows_of(length)) is None
        assert (
            backend in {"cpu": PORTABLE, "gpu": (*PORTABLE, "cudnn", "triton"), "tpu": (*PORTABLE, "splash")}[platform]
        )
        assert backend != "dense" or length <= LONGEST_DENSE_ROW


def test_long_bf16_rows_take_the_kernel_of_the_platform():
    def chosen(platform, dtype=jnp.bfloat16, length=32_768):
        return default_backend(length, platform, spec_of(dtype))

    assert [chosen(platform) for platform in ("cpu", "gpu", "tpu")] == ["blockwise", "cudnn", "splash"]
    assert [chosen(platform, jnp.float32) for platform in ("cpu", "gpu", "tpu")] == ["blockwise"] * 3
    short = LONGEST_DENSE_ROW_WITH_KERNELS
    assert [chosen(platform, length=short) for platform in ("cpu", "gpu", "tpu")] == ["dense"] * 3
    assert [chosen(platform, length=short + 1) for platform in ("cpu", "gpu", "tpu")] == ["dense", "cudnn", "splash"]


def test_the_tpu_kernel_is_not_chosen_where_the_compiler_would_have_to_partition_it(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    called = {"outside": [], "inside": []}

    def record(where, name):
        return dataclasses.replace(BACKENDS[name], attention=lambda q, *_, **__: called[where].append(name) or q)

    q, k, v = (x.astype(jnp.bfloat16) for x in random_inputs(300, batch=8))
    monkeypatch.setattr(dispatch, "BACKENDS", {name: record("outside", name) for name in BACKENDS})
    jax.eval_shape(attend, q, k, v)
    monkeypatch.setattr(dispatch, "BACKENDS", {name: record("inside", name) for name in BACKENDS})
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    jax.eval_shape(jax.shard_map(attend, mesh=mesh, in_specs=rows, out_specs=rows), q, k, v)
    assert called == {"outside": ["blockwise"], "inside": ["splash"]}


def test_the_choice_is_described_for_the_log():
    line = describe_backend(None, [16_384, 64, 128, 512], "gpu", spec_of())
    assert line == "attention: dense (rows of 64 to 128 tokens), cudnn (rows of 512 to 16,384 tokens)"
    assert describe_backend("blockwise", [64, 512], "gpu", spec_of(jnp.float32)) == "attention: blockwise"
    assert describe_backend(None, [512], "cpu", spec_of(head_dim=64)) == "attention: blockwise (rows of 512 tokens)"


def test_packed_rows_take_a_kernel_that_supports_segments_or_else_plain_jnp():
    def described(platform, backend=None):
        return describe_backend(backend, [128, 4_096], platform, spec_of(packed=True))

    assert described("tpu") == "attention: dense (packed rows of 128 tokens), splash (packed rows of 4,096 tokens)"
    assert described("gpu") == "attention: dense (packed rows of 128 tokens), triton (packed rows of 4,096 tokens)"
    assert described("gpu", "blockwise") == "attention: blockwise"
    with pytest.raises(ConfigError, match="'cudnn' does not support segment ids; use 'auto' or 'blockwise'"):
        described("gpu", "cudnn")


def test_windows_count_only_in_rows_that_are_longer():
    spec = spec_of(packed=True, window=1_000)
    line = describe_backend(None, [512, 4_096], "gpu", spec)
    assert line == "attention: triton (packed rows of 512 tokens), blockwise (packed rows of 4,096 tokens)"
    assert describe_backend("triton", [512], "gpu", spec) == "attention: triton"
    for lengths in ([512, 4_096], []):  # no lengths: not known yet
        with pytest.raises(ConfigError, match="'triton' does not support a sliding window"):
            describe_backend("triton", lengths, "gpu", spec)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "packed", "backend"),
    [
        (jnp.bfloat16, 128, True, "triton"),
        (jnp.bfloat16, 128, False, "cudnn"),
        (jnp.bfloat16, 96, True, "blockwise"),
        (jnp.float32, 128, True, "blockwise"),
    ],
)
def test_gpus_take_triton_only_for_packed_rows(dtype, head_dim, packed, backend):
    assert default_backend(4_096, "gpu", spec_of(dtype, head_dim, packed=packed)) == backend


def test_a_missing_scale_support_is_named():
    """Every backend of ours has it."""
    backend = dataclasses.replace(BACKENDS["dense"], supports_scale=False)
    assert backend.refusal(spec_of(scale=0.3)) == "does not support a scale"
    assert backend.refusal(spec_of()) is None


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
        describe_backend(backend, [512], platform, spec_of(dtype, head_dim))
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
