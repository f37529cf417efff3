"""Over which mesh axes the student's parameters are split for scoring: what fits, or what the user asked for."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lark_jax.errors import ConfigError
from lark_jax.runtime.sharding import DATA, TENSOR, parameter_sharding
from lark_jax.students.architecture import Architecture
from lark_jax.students.parameters import parameter_shapes

REPLICATED_SHARE = 0.5  # of a device's memory; the rest is for activations, logits and the compiler's copies


def choose_parameter_axes(
    architecture: Architecture,
    mesh: Mesh,
    dtype: DTypeLike,
    requested: str,
    device_memory_bytes: int | None,
) -> tuple[str, ...]:
    """Mesh axes for `sharding.parameter_spec`; always with `tensor` where the mesh has more than one device along it.

    Args:
      dtype: of the parameters.
      requested: "replicated" over `data`, "gathered" from `data` layer by layer, or "auto": replicated where the
        parameters take at most `REPLICATED_SHARE` of a device.
      device_memory_bytes: of one device; None: unknown, taken as enough.

    Raises:
      ConfigError: see `check_tensor_axis`.
    """
    check_tensor_axis(architecture, mesh)
    replicated = tuple(axis for axis in (TENSOR,) if mesh.shape[axis] > 1)
    gathered = tuple(axis for axis in (DATA, TENSOR) if mesh.shape[axis] > 1)
    if requested != "auto":
        return {"replicated": replicated, "gathered": gathered}[requested]
    if device_memory_bytes is None:
        return replicated
    fits = parameter_bytes_per_device(architecture, mesh, dtype, replicated) <= REPLICATED_SHARE * device_memory_bytes
    return replicated if fits else gathered


def parameter_bytes_per_device(
    architecture: Architecture, mesh: Mesh, dtype: DTypeLike, parameter_axes: tuple[str, ...]
) -> int:
    """Bytes of all parameters on each device of `mesh`."""
    shapes = parameter_shapes(architecture)
    return bytes_per_device({n: jax.ShapeDtypeStruct(shapes[n], dtype) for n in shapes}, mesh, parameter_axes)


def bytes_per_device(
    parameters: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh, parameter_axes: tuple[str, ...]
) -> int:
    """Of these parameters, by dotted name, on each device of `mesh`."""
    return sum(
        math.prod(parameter_sharding(name, value.shape, mesh, parameter_axes).shard_shape(value.shape))
        * value.dtype.itemsize
        for name, value in parameters.items()
    )


def smallest_device_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that JAX may use on the smallest of these own devices; None where the platform does not say (CPU)."""
    stats = [device.memory_stats() for device in devices]
    limits = [entry["bytes_limit"] for entry in stats if entry and "bytes_limit" in entry]
    return min(limits, default=None)


def check_tensor_axis(architecture: Architecture, mesh: Mesh) -> None:
    """Heads are never cut: `tensor` must divide the key-value heads.

    Raises:
      ConfigError: it does not; names the divisors.
    """
    heads, devices = architecture.num_kv_heads, mesh.shape[TENSOR]
    if heads % devices:
        divisors = ", ".join(str(divisor) for divisor in range(1, heads + 1) if heads % divisor == 0)
        raise ConfigError(
            f"config.mesh.tensor: expected a divisor of the student's {heads} key-value heads ({divisors}), "
            f"got {devices}"
        )
