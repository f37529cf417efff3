"""One mesh per process, or one that spans them all: decided once, before anything is loaded."""

from collections.abc import Sequence

import jax
from jax.typing import DTypeLike

from lark_jax.config import MeshConfig
from lark_jax.scoring.parameter_axes import REPLICATED_SHARE, choose_parameter_axes, parameter_bytes_per_device
from lark_jax.sharding import make_mesh
from lark_jax.students.architecture import Architecture


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
    """Whether each process can score its share on a mesh of its own devices, without talking to the others.

    It can where `config` does not ask for the devices of all processes (data x tensor), the `tensor` axis divides its
    own devices, and the parameters, in the layout that `choose_parameter_axes` takes there, leave as much room on a
    device as replicated ones have to.

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
    mesh = make_mesh(config, local)
    axes = choose_parameter_axes(architecture, mesh, dtype, requested, device_memory_bytes)
    if device_memory_bytes is None:
        return True
    return parameter_bytes_per_device(architecture, mesh, dtype, axes) <= REPLICATED_SHARE * device_memory_bytes
