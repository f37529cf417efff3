"""Analytic cost of a forward pass, and the peak of devices: the two sides of model FLOP utilization."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from jax.sharding import Mesh

from lark_jax.students.architecture import Architecture
from lark_jax.students.lora import Lora
from lark_jax.students.parameters import parameter_shapes

# Dense bfloat16 peak of one JAX device, without sparsity, from the vendors' data sheets. The first key that
# `jax.Device.device_kind` contains counts.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2_250e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
)


@dataclass(frozen=True)
class Rates:
    """Throughput of a student, padding not counted."""

    tokens_per_second: float
    flops_per_second: float
    peak_flops: float | None  # FLOP/s of all devices together; None: unknown

    @property
    def model_flop_utilization(self) -> float | None:
        """Share of the devices' bfloat16 peak, in [0, 1]."""
        return None if self.peak_flops is None else self.flops_per_second / self.peak_flops

    def __str__(self) -> str:
        utilization = self.model_flop_utilization
        compute = f"{self.flops_per_second / 1e9:,.1f} GFLOP/s" if utilization is None else f"MFU {utilization:.1%}"
        return f"{self.tokens_per_second:,.0f} tokens/s, {compute}"


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device of this kind; None: not in the table."""
    return next((peak for name, peak in PEAK_FLOPS if name in device_kind), None)


def peak_flops_of(mesh: Mesh) -> float | None:
    """FLOP/s of all devices of `mesh` together; None: unknown."""
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return None if peak is None else peak * mesh.devices.size


def forward_flops(architecture: Architecture, length: int, *, vocab: bool = True) -> float:
    """FLOPs of one row of `length` tokens, 2 per multiply-add: matrix products, attention and, with `vocab`, the head.

    Attention counts the pairs that the causal mask and the window leave: t + 1 keys and values for token t. Norms,
    rotations, activations and the softmax are not counted, as usual.
    """
    matrices = sum(math.prod(shape) for shape in _layer_matrices(architecture).values())
    projections = 2.0 * architecture.num_layers * matrices
    head = 2.0 * architecture.vocab_size * architecture.hidden_size if vocab else 0.0
    return length * (projections + head) + attention_flops(architecture, length)


def training_flops(architecture: Architecture, length: int, remat: str, lora: Lora | None = None) -> float:
    """FLOPs of a forward and a backward pass over one row, including what `remat` recomputes.

    The backward pass has two products for each product of the forward pass, one where the weight is not trained.
    Recomputation counts as a whole forward pass; with remat="attention", without attention itself. Without `lora`,
    every parameter is trained.
    """
    attention = attention_flops(architecture, length)
    weights = forward_flops(architecture, length) - attention
    adapter = 0.0 if lora is None else length * 2.0 * adapter_parameter_count(architecture, lora)
    forward = weights + attention + adapter
    recomputed = {"none": 0.0, "attention": forward - attention}.get(remat, forward)
    weight_gradients = weights if lora is None else 0.0
    return 2.0 * forward + attention + adapter + weight_gradients + recomputed


def adapter_parameter_count(architecture: Architecture, lora: Lora) -> int:
    """Parameters in A and B of all layers."""
    shapes = _layer_matrices(architecture)
    return architecture.num_layers * sum(lora.rank * sum(shapes[target]) for target in lora.targets)


def attention_flops(architecture: Architecture, length: int) -> float:
    """The part of `forward_flops` that depends on pairs of tokens: q k' and p v."""
    window = min(length, architecture.sliding_window or length)
    return pair_flops(architecture) * (window * (window + 1) / 2 + (length - window) * window)


def pair_flops(architecture: Architecture) -> float:
    """FLOPs of one query and one key that it sees, in all layers."""
    return 4.0 * architecture.num_layers * architecture.num_heads * architecture.head_dim


def parameter_count(architecture: Architecture) -> int:
    """All parameters; a head that is tied to the embedding counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(architecture).values())


@functools.cache
def _layer_matrices(architecture: Architecture) -> Mapping[str, tuple[int, int]]:
    """Module name -> (out, in) of the matrices of one layer."""
    names = {name: shape[1:] for name, shape in parameter_shapes(architecture).items() if name.startswith("layers.")}
    return {name.split(".")[-2]: (shape[0], shape[1]) for name, shape in names.items() if len(shape) == 2}
