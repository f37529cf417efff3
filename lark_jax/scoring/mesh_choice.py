"""One mesh per process, or one that spans them all: decided once, before anything is loaded."""

from collections.abc import Sequence

import jax
from jax.typing import DTypeLike

from lark_jax.config import MeshConfig
from lark_jax.runtime.sharding import DATA, TENSOR, make_mesh
from lark_jax.scoring.parameter_axes import REPLICATED_SHARE, parameter_bytes_per_device
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
    own devices, and the parameters, split over all of these, leave as much room on a device as replicated ones have
    to. Parameters that shall be "replicated" take the same room on any mesh.

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
    if device_memory_bytes is None or requested == "replicated":
        return True
    split = parameter_bytes_per_device(architecture, make_mesh(config, local), dtype, (DATA, TENSOR))
    return split <= REPLICATED_SHARE * device_memory_bytes
