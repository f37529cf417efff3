"""The mesh has the devices it was asked for, and one row of the table fits every parameter."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from lark_jax.config import MeshConfig
from lark_jax.errors import ConfigError
from lark_jax.preflight.requests import ENVIRONMENT
from lark_jax.runtime.sharding import DATA, TENSOR, make_mesh, parameter_sharding, parameter_spec, replicated, rows

# Every name that a supported decoder can have, with shapes that 8 devices divide (norms and biases apart).
DECODER_SHAPES = {
    "embed_tokens.weight": (512, 64),
    "lm_head.weight": (512, 64),
    "norm.weight": (64,),
    "layers.input_layernorm.weight": (3, 64),
    "layers.post_attention_layernorm.weight": (3, 64),
    "layers.self_attn.q_norm.weight": (3, 16),
    "layers.self_attn.k_norm.weight": (3, 16),
    "layers.self_attn.q_proj.weight": (3, 64, 64),
    "layers.self_attn.k_proj.weight": (3, 32, 64),
    "layers.self_attn.v_proj.weight": (3, 32, 64),
    "layers.self_attn.o_proj.weight": (3, 64, 64),
    "layers.self_attn.q_proj.bias": (3, 64),
    "layers.self_attn.k_proj.bias": (3, 32),
    "layers.self_attn.v_proj.bias": (3, 32),
    "layers.mlp.gate_proj.weight": (3, 128, 64),
    "layers.mlp.up_proj.weight": (3, 128, 64),
    "layers.mlp.down_proj.weight": (3, 64, 128),
    "layers.self_attn.k_proj.lora_A.weight": (3, 8, 64),
    "layers.self_attn.k_proj.lora_B.weight": (3, 32, 8),
    "layers.mlp.up_proj.lora_A.weight": (3, 8, 64),
    "layers.mlp.up_proj.lora_B.weight": (3, 128, 8),
    "layers.mlp.down_proj.lora_A.weight": (3, 8, 128),
    "layers.mlp.down_proj.lora_B.weight": (3, 64, 8),
}


def test_mesh_takes_all_devices_by_default() -> None:
    mesh = make_mesh(MeshConfig())
    assert dict(mesh.shape) == {DATA: 8, TENSOR: 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("count", [1, 2, 8])
def test_mesh_over_some_devices(count: int) -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:count])
    assert list(mesh.devices.flat) == jax.devices()[:count]


@pytest.mark.parametrize("data", [1, 3, 16])
def test_mesh_that_does_not_match_the_devices_is_refused(data: int) -> None:
    with pytest.raises(ConfigError, match=rf"config\.mesh: data={data} .* 8 devices") as caught:
        make_mesh(MeshConfig(data=data))
    assert "\n" not in str(caught.value)


MESHES_OF_TWO_SLICES = """
import json, sys
from jax.experimental import topologies
from lark_jax.config import MeshConfig
from lark_jax.errors import ConfigError
from lark_jax.runtime.sharding import make_mesh

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
for tensor in (1, 2, 8):
    try:
        mesh = make_mesh(MeshConfig(tensor=tensor), list(devices)[::-1])
        print([[device.slice_index for device in row] for row in mesh.devices])
    except ConfigError as error:
        print(error)
"""


def test_over_two_slices_data_goes_from_one_to_the_other_once() -> None:
    pytest.importorskip("libtpu")
    done = subprocess.run(
        [sys.executable, "-c", MESHES_OF_TWO_SLICES],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone, split, refusal = done.stdout.splitlines()
    assert json.loads(alone) == [[0]] * 4 + [[1]] * 4
    assert json.loads(split) == [[0, 0]] * 2 + [[1, 1]] * 2
    assert refusal.startswith("config.mesh.tensor: 8 leaves data=1, which the 2 slices of the 8 devices do not divide")


@pytest.mark.parametrize("name", DECODER_SHAPES)
def test_every_matrix_is_split_over_data_exactly_once_and_reassembles(name: str) -> None:
    mesh = make_mesh(MeshConfig())
    shape = DECODER_SHAPES[name]
    value = np.random.default_rng().standard_normal(shape).astype(np.float32)
    sharded = jax.device_put(jnp.asarray(value), parameter_sharding(name, shape, mesh))
    is_matrix = not name.endswith(("norm.weight", ".bias"))
    assert sharded.addressable_shards[0].data.size == value.size // (8 if is_matrix else 1)
    np.testing.assert_array_equal(np.asarray(sharded), value)


@pytest.mark.parametrize("name", DECODER_SHAPES)
def test_layer_axis_is_never_split(name: str) -> None:
    spec = parameter_spec(name, DECODER_SHAPES[name], make_mesh(MeshConfig()))
    assert len(spec) <= len(DECODER_SHAPES[name])
    if name.startswith("layers."):
        assert tuple(spec)[:1] in ((), (None,))


@pytest.mark.parametrize("size", [1, 7, 12, 63, 65])
def test_a_dimension_that_the_devices_do_not_divide_stays_whole(size: int) -> None:
    mesh = make_mesh(MeshConfig())
    assert DATA not in tuple(parameter_spec("layers.mlp.down_proj.weight", (2, size, 8), mesh))
    assert DATA in tuple(parameter_spec("layers.mlp.down_proj.weight", (2, 8 * size, 8), mesh))


@pytest.mark.parametrize(("axes", "ways"), [((), 1), ((TENSOR,), 2), ((DATA,), 4), ((DATA, TENSOR), 8)])
@pytest.mark.parametrize("name", DECODER_SHAPES)
def test_parameters_are_split_over_the_chosen_axes_only(name: str, axes: tuple[str, ...], ways: int) -> None:
    mesh = make_mesh(MeshConfig(tensor=2))
    shape = DECODER_SHAPES[name]
    sharding = parameter_sharding(name, shape, mesh, axes)
    assert {axis for axis in sharding.spec if axis} <= set(axes)
    size = math.prod(sharding.shard_shape(shape))
    if name.endswith("norm.weight"):
        assert size == math.prod(shape)
    elif name.endswith(".bias"):
        assert size == math.prod(shape) // (2 if TENSOR in axes else 1)
    elif name.endswith(("k_proj.lora_A.weight", "up_proj.lora_A.weight", "down_proj.lora_B.weight")):
        assert size == math.prod(shape) // (4 if DATA in axes else 1)  # the side that the weight's split does not touch
    else:
        assert size == math.prod(shape) // ways


def test_products_of_a_layer_need_one_sum_over_tensor_each() -> None:
    """Outputs of q, k, v, gate and up are split; o and down take them as inputs."""
    mesh = make_mesh(MeshConfig(tensor=2))
    for name, shape in DECODER_SHAPES.items():
        spec = tuple(parameter_spec(name, shape, mesh, (TENSOR,)))
        if name.endswith("proj.weight"):
            assert spec.index(TENSOR) == (2 if "o_proj" in name or "down_proj" in name else 1)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "layers.mlp.gate_proj",
        "model.embed_tokens.weight",
        "layers.mlp.gate_proj.bias",
        "xnorm.weights",
        "lm_head.bias",
    ],
)
def test_unknown_parameter_is_an_error(name: str) -> None:
    with pytest.raises(KeyError, match="0 rows of PARAMETER_SPECS"):
        parameter_spec(name, (8, 8), make_mesh(MeshConfig()))


def test_rows_are_split_and_replicated_arrays_are_whole_on_every_device() -> None:
    mesh = make_mesh(MeshConfig())
    values = np.arange(16 * 3).reshape(16, 3)
    by_rows = jax.device_put(values, rows(mesh))
    assert [shard.data.shape for shard in by_rows.addressable_shards] == [(2, 3)] * 8
    everywhere = jax.device_put(values, replicated(mesh))
    assert [shard.data.shape for shard in everywhere.addressable_shards] == [(16, 3)] * 8
    assert replicated(mesh).spec == PartitionSpec()
