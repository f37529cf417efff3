"""Names of hardware -> the devices to compile for.

"v5p:2x2x2" names a TPU slice by its layout of chips; "v5p-16" is the cloud's name for the same slice, which counts
TensorCores (two per chip) for v4 and v5p and chips for v5e and v6e; "a100-80gb:8" means eight cards, in hosts of eight.
"""

import dataclasses
import math
import re
from typing import Any

from lark_jax.errors import ConfigError
from lark_jax.preflight.hardware import CARDS, TPU_CHIPS, Card, Chip, TpuChip, gpu_share

CARDS_PER_HOST = 8
_CLOUD_ALIASES = {"v5litepod": "v5e"}
_LARGEST_NAMED_SLICE = 4096  # chips


@dataclasses.dataclass(frozen=True)
class Topology:
    """Equal devices in equal hosts."""

    name: str  # the canonical spelling
    platform: str  # JAX's name, "tpu" or "cuda"
    chip: Chip
    layout: tuple[int, ...]  # TPU: chips along each dimension of the slice; NVIDIA: (hosts, cards per host)
    devices_per_host: int
    memory_bytes: int  # what JAX may use on one device

    @property
    def num_devices(self) -> int:
        return math.prod(self.layout)

    @property
    def num_hosts(self) -> int:
        return self.num_devices // self.devices_per_host

    def description(self) -> dict[str, Any]:
        """Arguments of `jax.experimental.topologies.get_topology_desc`."""
        if isinstance(self.chip, Card):
            return {
                "platform": "cuda",
                "topology_name": self.name,
                "topology": "x".join(map(str, (1, *self.layout))),
                "target_config": self.chip.target_config(),
            }
        assert isinstance(self.chip, TpuChip)
        return {
            "platform": "tpu",
            "topology_name": f"{self.chip.name}:{'x'.join(map(str, self.layout))}",
            "chips_per_host_bounds": _host_bounds(self.layout, self.devices_per_host),
            **self.chip.libtpu_options,
        }

    def one_host(self) -> "Topology":
        """The devices of one host: those of one process's own mesh."""
        if isinstance(self.chip, Card):
            return _card_topology(self.chip, self.devices_per_host)
        assert isinstance(self.chip, TpuChip)
        return _slice_topology(self.chip, _host_bounds(self.layout, self.devices_per_host)[: self.chip.dimensions])


def parse_topology(text: str) -> Topology:
    """Parses a name, see the module's docstring.

    Raises:
      ConfigError: unknown chip or impossible slice; lists the known ones.
    """
    name, separator, size = _split(text.strip().lower())
    if name in CARDS and separator in ("", ":"):
        if size and not re.fullmatch(r"[1-9][0-9]*", size):
            raise ConfigError(f"--topology={text}: expected a number of cards after the colon, e.g. {name}:8")
        return _card_topology(CARDS[name], int(size or 1))
    name = _CLOUD_ALIASES.get(name, name)
    if name in TPU_CHIPS and separator == ":":
        return _slice_topology(TPU_CHIPS[name], _layout_from_text(text, TPU_CHIPS[name], size))
    if name in TPU_CHIPS and separator == "-" and size.isdecimal():
        return _slice_topology(TPU_CHIPS[name], _layout_from_size(text, TPU_CHIPS[name], int(size)))
    raise ConfigError(
        f"--topology={text}: expected TPUs by layout or the cloud's name (v5p:2x2x2, v5p-16, v5e-16; chips: "
        f"{', '.join(TPU_CHIPS)}), NVIDIA cards by number (a100-80gb:8; cards: {', '.join(CARDS)})"
    )


def _split(text: str) -> tuple[str, str, str]:
    if ":" in text or text in CARDS:
        return text.partition(":")
    name, separator, size = text.rpartition("-")
    return (name, separator, size) if separator else (size, "", "")


def _card_topology(card: Card, count: int) -> Topology:
    per_host = min(count, CARDS_PER_HOST)
    if count % per_host:
        raise ConfigError(
            f"--topology={card.name}:{count}: above {CARDS_PER_HOST} cards, expected whole hosts of {CARDS_PER_HOST}"
        )
    return Topology(
        name=f"{card.name}:{count}",
        platform="cuda",
        chip=card,
        layout=(count // per_host, per_host),
        devices_per_host=per_host,
        memory_bytes=int(card.memory_bytes * gpu_share()),
    )


def _layout_from_text(text: str, chip: TpuChip, layout: str) -> tuple[int, ...]:
    example = "x".join(["2", "2", "2"][: chip.dimensions])
    if not re.fullmatch("x".join([r"[1-9]\d*"] * chip.dimensions), layout):
        raise ConfigError(f"--topology={text}: expected {chip.dimensions} numbers of chips, e.g. {chip.name}:{example}")
    sizes = tuple(map(int, layout.split("x")))
    if math.prod(sizes) > 1 and any(size % 2 for size in sizes[:2]):
        raise ConfigError(
            f"--topology={text}: expected even numbers along the first two dimensions (hosts have 2 x 2 chips), "
            f"e.g. {chip.name}:{example}"
        )
    return sizes


def _layout_from_size(text: str, chip: TpuChip, size: int) -> tuple[int, ...]:
    """The cloud's layout of a named slice: as close to a cube or square as powers of two allow."""
    chips = size // chip.cores_per_chip
    smallest = 4 if chip.dimensions == 3 else 1
    known = smallest <= chips <= _LARGEST_NAMED_SLICE and chips & (chips - 1) == 0 and chips != 2
    if not known or size % chip.cores_per_chip:
        counted = "TensorCores, two per chip" if chip.cores_per_chip == 2 else "chips"
        raise ConfigError(
            f"--topology={text}: {chip.name}-N counts {counted}; expected N a power of two from "
            f"{smallest * chip.cores_per_chip}, or a layout such as {chip.name}:{'x'.join('2' * chip.dimensions)}"
        )
    doublings = chips.bit_length() - 1
    if chips == 4 and chip.dimensions == 3:
        return (2, 2, 1)
    exponents = sorted((doublings + place) // chip.dimensions for place in range(chip.dimensions))
    return tuple(2**exponent for exponent in exponents)


def _slice_topology(chip: TpuChip, layout: tuple[int, ...]) -> Topology:
    return Topology(
        name=f"{chip.name}:{'x'.join(map(str, layout))}",
        platform="tpu",
        chip=chip,
        layout=layout,
        devices_per_host=_chips_per_host(chip, layout),
        memory_bytes=chip.memory_bytes,
    )


def _chips_per_host(chip: TpuChip, layout: tuple[int, ...]) -> int:
    """Four, except for single chips and the eight-chip machines of v5e and v6e."""
    chips = math.prod(layout)
    single_host = chips < 4 or (chip.dimensions == 2 and chips == 8)
    return chips if single_host else 4


def _host_bounds(layout: tuple[int, ...], chips_per_host: int) -> tuple[int, int, int]:
    if chips_per_host == 4:
        return (2, 2, 1)
    first, second = layout[:2]
    return (first, second, 1)
