"""The layout of a student for scoring: on which mesh, and over which of its axes parameters are split."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lark_jax.config import MeshConfig
from lark_jax.runtime.sharding import DATA, TENSOR, make_mesh
from lark_jax.students.architecture import Architecture
from lark_jax.students.parameters import abstract_decoder
from lark_jax.students.sharded import ShardedStudent, check_tensor_axis

REPLICATED_SHARE = 0.5  # of a device's memory; the rest is for activations, logits and the compiler's copies


def choose_parameter_axes(
    architecture: Architecture, mesh: Mesh, dtype: DTypeLike, requested: str, device_memory_bytes: int | None
) -> tuple[str, ...]:
    """Mesh axes for `load_student`: always `tensor` where the mesh has more than one device along it.

    Args:
      dtype: of the parameters.
      requested: "replicated" over `data`, "gathered" from `data` layer by layer, or "auto": replicated if the
        parameters take at most `REPLICATED_SHARE` of a device.
      device_memory_bytes: of one device; None: unknown, assumed to be enough.
    """
    check_tensor_axis(architecture, mesh)
    replicated = tuple(axis for axis in (TENSOR,) if mesh.shape[axis] > 1)
    gathered = tuple(axis for axis in (DATA, TENSOR) if mesh.shape[axis] > 1)
    if requested != "auto":
        return {"replicated": replicated, "gathered": gathered}[requested]
    return replicated if _leaves_room(architecture, mesh, dtype, replicated, device_memory_bytes) else gathered


def fits_one_process(
    architecture: Architecture,
    config: MeshConfig,
    dtype: DTypeLike,
    requested: str,
    *,
    local: Sequence[jax.Device],
    everywhere: Sequence[jax.Device],
    device_memory_bytes: int | None,
) -> bool:
    """Whether each process can score its share on a mesh of its own devices, independently of the others.

    It can if `config` does not ask for the devices of all processes (data x tensor), the `tensor` axis divides the
    number of its own devices, and the parameters, split over all of them, leave as much room on a device as replicated
    ones have to. "replicated" parameters take the same room on any mesh.

    Args:
      dtype, requested, device_memory_bytes: as for `choose_parameter_axes`.
      local: this process's devices.
      everywhere: those of all processes.
    """
    if len(local) == len(everywhere):
        return True
    if config.data != -1:
        return config.data * config.tensor != len(everywhere)
    if len(local) % config.tensor:
        return False
    if requested == "replicated" or device_memory_bytes is None:
        return True
    return _leaves_room(architecture, make_mesh(config, local), dtype, (DATA, TENSOR), device_memory_bytes)


def smallest_device_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that JAX may use on the smallest of these local devices; None if the platform does not report it (CPU)."""
    stats = [device.memory_stats() for device in devices]
    limits = [entry["bytes_limit"] for entry in stats if entry and "bytes_limit" in entry]
    return min(limits, default=None)


def bytes_per_device(parameters: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Bytes that each device of the mesh holds of parameters with these shardings."""
    return sum(
        math.prod(parameter.sharding.shard_shape(parameter.shape)) * parameter.dtype.itemsize
        for parameter in parameters.values()
    )


def _leaves_room(
    architecture: Architecture, mesh: Mesh, dtype: DTypeLike, axes: Sequence[str], device_memory_bytes: int | None
) -> bool:
    if device_memory_bytes is None:
        return True
    student = ShardedStudent.abstract(abstract_decoder(architecture, dtype, dtype), mesh, axes)
    return bytes_per_device(student.parameters) <= REPLICATED_SHARE * device_memory_bytes
