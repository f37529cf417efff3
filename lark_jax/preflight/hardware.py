"""Chips and cards as JAX devices. Figures are the vendors' (dense bfloat16); sources are in third_party_notes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lark_jax.errors import ConfigError
from lark_jax.students.flops import peak_flops

GIB = 2**30
GPU_SHARE = 0.75  # JAX's default share of a card's memory; a variable of GPU_SHARE_VARIABLES overrides it
GPU_SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@dataclass(frozen=True)
class Chip:
    """One JAX device."""

    name: str  # as users write it
    device_kind: str  # as `students.flops.PEAK_FLOPS` knows it
    memory_bytes: int  # usable by programs
    memory_bandwidth: float  # bytes/s between chip and its memory
    link_bandwidth: float  # bytes/s to a device's neighbours: NVLink; two links (one axis) of a TPU's torus
    host_bandwidth: float  # bytes/s from one device to other hosts; the same links inside a TPU slice

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        peak = peak_flops(self.device_kind)
        assert peak is not None, self.device_kind
        return peak


@dataclass(frozen=True)
class TpuChip(Chip):
    """A TPU chip: dimensions of its torus, TensorCores per chip in the cloud's names, options for libtpu."""

    dimensions: int
    cores_per_chip: int
    libtpu_options: Mapping[str, str]


@dataclass(frozen=True)
class Card(Chip):
    """An NVIDIA card: what XLA's GPU compiler needs to know about a card that is not present."""

    compute_capability: int  # major; minor is 0 for all of these
    core_count: int
    fpus_per_core: int
    clock_rate_ghz: float
    l2_cache_bytes: int
    shared_memory_per_core: int
    shared_memory_per_block: int

    def target_config(self) -> str:
        """XLA's `GpuTargetConfigProto` as text."""
        return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {self.compute_capability} minor: 0 }}
  core_count: {self.core_count}
  fpus_per_core: {self.fpus_per_core}
  clock_rate_ghz: {self.clock_rate_ghz}
  device_memory_size: {self.memory_bytes}
  memory_bandwidth: {int(self.memory_bandwidth)}
  l2_cache_size: {self.l2_cache_bytes}
  shared_memory_per_core: {self.shared_memory_per_core}
  shared_memory_per_block_optin: {self.shared_memory_per_block}
  shared_memory_per_block: 49152
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{self.device_kind}"
"""


def _tpu(name: str, memory_gib: float, memory_gbs: float, axis_gbs: float, *, dimensions: int, cores: int) -> TpuChip:
    return TpuChip(
        name=name,
        device_kind=f"TPU {name}",
        memory_bytes=int(memory_gib * GIB),
        memory_bandwidth=memory_gbs * 1e9,
        link_bandwidth=axis_gbs * 1e9,
        host_bandwidth=axis_gbs * 1e9,
        dimensions=dimensions,
        cores_per_chip=cores,
        libtpu_options={"chip_config_name": "megacore"} if name == "v4" else {},  # else one device per TensorCore
    )


# Memory: what libtpu's compiler reports as available.
TPU_CHIPS: Mapping[str, TpuChip] = {
    chip.name: chip
    for chip in (
        _tpu("v4", 30.75, 1228, 100, dimensions=3, cores=2),
        _tpu("v5e", 15.75, 819, 100, dimensions=2, cores=1),
        _tpu("v5p", 95.73, 2765, 200, dimensions=3, cores=2),
        _tpu("v6e", 31.24, 1638, 200, dimensions=2, cores=1),
    )
}


_A100 = Card(
    name="a100-80gb",
    device_kind="NVIDIA A100-SXM4-80GB",
    memory_bytes=85_100_068_864,
    memory_bandwidth=2039.04e9,
    link_bandwidth=300e9,
    host_bandwidth=25e9,
    compute_capability=8,
    core_count=108,
    fpus_per_core=64,
    clock_rate_ghz=1.41,
    l2_cache_bytes=41_943_040,
    shared_memory_per_core=167_936,
    shared_memory_per_block=166_912,
)
_SMALL_A100 = replace(
    _A100, name="a100-40gb", device_kind="NVIDIA A100-SXM4-40GB", memory_bytes=42_331_013_120, memory_bandwidth=1555.2e9
)
_H100 = Card(
    name="h100",
    device_kind="NVIDIA H100 80GB HBM3",
    memory_bytes=84_942_979_072,
    memory_bandwidth=3352.32e9,
    link_bandwidth=450e9,
    host_bandwidth=50e9,
    compute_capability=9,
    core_count=132,
    fpus_per_core=128,
    clock_rate_ghz=1.98,
    l2_cache_bytes=52_428_800,
    shared_memory_per_core=233_472,
    shared_memory_per_block=232_448,
)
_H200 = replace(
    _H100, name="h200", device_kind="NVIDIA H200 141GB HBM3e", memory_bytes=151_397_597_184, memory_bandwidth=4800e9
)
_B200 = replace(
    _H100,
    name="b200",
    device_kind="NVIDIA B200",
    memory_bytes=191_514_411_008,
    memory_bandwidth=7672.32e9,
    link_bandwidth=900e9,
    compute_capability=10,
    core_count=148,
    clock_rate_ghz=1.965,
    l2_cache_bytes=132_644_864,
)
# The SXM boards. Between hosts: one network adapter of 200 Gbit/s (A100) or 400 Gbit/s per card, as in common clusters.
CARDS: Mapping[str, Card] = {card.name: card for card in (_SMALL_A100, _A100, _H100, _H200, _B200)}


def gpu_share() -> float:
    """The share of a card's memory that JAX takes in this environment.

    Raises:
      ConfigError: the variable is not a number in (0, 1].
    """
    for variable in GPU_SHARE_VARIABLES:
        value = os.environ.get(variable, "")
        if not value:
            continue
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            raise ConfigError(f"{variable}={value!r}: expected a number above 0, at most 1")
        return share
    return GPU_SHARE
