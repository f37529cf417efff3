"""The device mesh and one table: parameter name -> PartitionSpec.

Mesh axes: `data` (rows; in fine-tuning also parameters, gradients and Adam moments: FSDP) and `tensor` (the inside of a
layer). Names and shapes are those of `students.decoder`: HF's, with layers stacked on a leading axis.
"""

import collections
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lark_jax.config import MeshConfig
from lark_jax.errors import ConfigError

DATA = "data"
TENSOR = "tensor"

# Stacked layer parameters are [num_layers, out, in]. The output side of q, k, v, gate and up and the input side of o
# and down are split over `tensor`, the other side over `data`. Norm scales are small and stay whole. An adapter's
# factors, [num_layers, rank, in] and [num_layers, out, rank], are split over `tensor` on the side where the weight is.
PARAMETER_SPECS: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed_tokens\.weight", PartitionSpec(TENSOR, DATA)),
    (r"lm_head\.weight", PartitionSpec(TENSOR, DATA)),
    (r"layers\.self_attn\.[qkv]_proj\.weight", PartitionSpec(None, TENSOR, DATA)),
    (r"layers\.self_attn\.[qkv]_proj\.bias", PartitionSpec(None, TENSOR)),
    (r"layers\.self_attn\.o_proj\.weight", PartitionSpec(None, DATA, TENSOR)),
    (r"layers\.mlp\.(gate|up)_proj\.weight", PartitionSpec(None, TENSOR, DATA)),
    (r"layers\.mlp\.down_proj\.weight", PartitionSpec(None, DATA, TENSOR)),
    (r"layers\.(self_attn\.[qkv]|mlp\.(gate|up))_proj\.lora_A\.weight", PartitionSpec(None, None, DATA)),
    (r"layers\.(self_attn\.[qkv]|mlp\.(gate|up))_proj\.lora_B\.weight", PartitionSpec(None, TENSOR, DATA)),
    (r"layers\.(self_attn\.o|mlp\.down)_proj\.lora_A\.weight", PartitionSpec(None, DATA, TENSOR)),
    (r"layers\.(self_attn\.o|mlp\.down)_proj\.lora_B\.weight", PartitionSpec(None, DATA, None)),
    (r"(layers\.)?([a-z_]+\.)*[a-z_]*norm\.weight", PartitionSpec()),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of shape [data, tensor] over `devices` (default: all).

    If the devices belong to several slices (of TPUs; a host of NVIDIA cards counts as one), `tensor` stays inside a
    slice, and so do neighbours along `data`.

    Raises:
      ConfigError: the number of devices is not data x tensor, or the number of slices does not divide data.
    """
    devices = jax.devices() if devices is None else devices
    data = len(devices) // config.tensor if config.data == -1 else config.data
    if data * config.tensor != len(devices):
        raise ConfigError(
            f"config.mesh: data={config.data} x tensor={config.tensor} does not match {len(devices)} devices "
            f"({devices[0].platform}); set mesh.data=-1 to use them all"
        )
    axis_types = (AxisType.Auto,) * 2
    devices_by_slice = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    slices = len(devices_by_slice)
    if slices == 1:
        return jax.make_mesh((data, config.tensor), (DATA, TENSOR), axis_types=axis_types, devices=devices)
    if len(set(devices_by_slice.values())) > 1:
        raise ConfigError(
            f"config.mesh: slices have {', '.join(map(str, devices_by_slice.values()))} devices; use slices of one size"
        )
    if data % slices:
        raise ConfigError(
            f"config.mesh.tensor: {config.tensor} leaves data={data}, which the {slices} slices of the {len(devices)} "
            "devices do not divide; layers are split inside a slice"
        )
    grid = create_hybrid_device_mesh((data // slices, config.tensor), (slices, 1), devices)
    return Mesh(grid, (DATA, TENSOR), axis_types=axis_types)


def parameter_spec(name: str, shape: Sequence[int], mesh: Mesh, axes: Sequence[str] = (DATA, TENSOR)) -> PartitionSpec:
    """The table's spec for parameter `name`, reduced to those of `axes` that split its dimension evenly.

    Args:
      axes: mesh axes that parameters may be split over. (): every device holds all parameters; (TENSOR,): layers are
        split into columns and rows; (DATA, TENSOR): the other dimension is split over `data` too.
    """

    def splits(axis: str | None, size: int) -> bool:
        return axis in axes and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0

    return PartitionSpec(
        *(axis if splits(axis, size) else None for axis, size in zip(table_spec(name), shape, strict=False))
    )


def table_spec(name: str) -> PartitionSpec:
    """The row of `PARAMETER_SPECS` for parameter `name`; KeyError unless exactly one matches."""
    matches = [spec for pattern, spec in PARAMETER_SPECS if re.fullmatch(pattern, name)]
    if len(matches) != 1:
        raise KeyError(f"{name}: {len(matches)} rows of PARAMETER_SPECS match, expected one")
    return matches[0]


def parameter_sharding(
    name: str, shape: Sequence[int], mesh: Mesh, axes: Sequence[str] = (DATA, TENSOR)
) -> NamedSharding:
    return NamedSharding(mesh, parameter_spec(name, shape, mesh, axes))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """For batches of rows: the leading axis is split over `data`."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def split_rows(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """`array` on the devices, split over `data`. If the mesh spans several processes, each passes the same array."""
    return jax.make_array_from_callback(array.shape, rows(mesh), array.__getitem__)
