"""Analytic cost of a forward pass, and what devices could do at best: the two sides of model FLOP utilisation."""

from dataclasses import dataclass

from jax.sharding import Mesh

from lark_jax.students.architecture import Architecture
from lark_jax.students.lora import Lora

# Dense bfloat16 peak of one device (one JAX device, so half a TPU v2/v3 board is not in here), from the vendors' data
# sheets, without sparsity. Keys are looked for in `jax.Device.device_kind`, in this order.
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
    """How fast tokens that are not padding go through a student."""

    tokens_per_second: float
    flops_per_second: float
    peak_flops: float | None  # FLOP/s of all devices together; None where it is not known

    @property
    def model_flop_utilization(self) -> float | None:
        """Share of the devices' bfloat16 peak, in [0, 1]."""
        return None if self.peak_flops is None else self.flops_per_second / self.peak_flops

    def __str__(self) -> str:
        utilization = self.model_flop_utilization
        compute = f"{self.flops_per_second / 1e9:,.1f} GFLOP/s" if utilization is None else f"MFU {utilization:.1%}"
        return f"{self.tokens_per_second:,.0f} tokens/s, {compute}"


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device that is called `device_kind`; None for a kind that is not in the table."""
    return next((peak for name, peak in PEAK_FLOPS if name in device_kind), None)


def peak_flops_of(mesh: Mesh) -> float | None:
    """Of all devices of `mesh` together; None where it is not known."""
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return None if peak is None else peak * mesh.devices.size


def forward_flops(architecture: Architecture, length: int, *, vocab: bool = True) -> float:
    """FLOPs of one row of `length` tokens, 2 per multiply-add: matrix products, attention, head.

    Attention is counted as causal: token t takes t + 1 products with keys and as many with values. Norms, rotations,
    activations and the softmax are left out, as is usual.

    Args:
      vocab: whether every token is also multiplied by the head.
    """
    projections = 2.0 * architecture.num_layers * _layer_matrices(architecture)
    head = 2.0 * architecture.vocab_size * architecture.hidden_size if vocab else 0.0
    return length * (projections + head) + attention_flops(architecture, length)


def training_flops(architecture: Architecture, length: int, remat: str, lora: Lora | None = None) -> float:
    """FLOPs of a forward and a backward pass over one row, with what `remat` computes twice.

    A backward pass has two products for each of the forward pass, but one for those with weights that are not trained.
    A recomputation is taken as a whole forward pass; "attention" leaves attention itself out of it.

    Args:
      lora: the adapter that is trained; None: every parameter is.
    """
    attention = attention_flops(architecture, length)
    weights = forward_flops(architecture, length) - attention
    adapter = 0.0 if lora is None else length * 2.0 * adapter_parameter_count(architecture, lora)
    forward = weights + attention + adapter
    recomputed = {"none": 0.0, "attention": forward - attention}.get(remat, forward)
    weight_gradients = weights if lora is None else 0.0
    return 2.0 * forward + attention + adapter + weight_gradients + recomputed


def adapter_parameter_count(architecture: Architecture, lora: Lora) -> int:
    """Of A and B of all layers."""
    shapes = _matrix_shapes(architecture)
    return architecture.num_layers * sum(lora.rank * sum(shapes[target]) for target in lora.targets)


def attention_flops(architecture: Architecture, length: int) -> float:
    """The part of `forward_flops` that grows with the square of `length`: q k' and p v over the lower triangle."""
    return pair_flops(architecture) * length * (length + 1) / 2


def pair_flops(architecture: Architecture) -> float:
    """FLOPs of one query and one key that it sees, in all layers."""
    return 4.0 * architecture.num_layers * architecture.num_heads * architecture.head_dim


def parameter_count(architecture: Architecture) -> int:
    """All parameters; a head that is tied to the embedding counts once."""
    table = architecture.vocab_size * architecture.hidden_size
    vectors = 2 * architecture.hidden_size
    if architecture.attention_bias:
        vectors += (architecture.num_heads + 2 * architecture.num_kv_heads) * architecture.head_dim
    if architecture.qk_norm:
        vectors += 2 * architecture.head_dim
    layers = architecture.num_layers * (_layer_matrices(architecture) + vectors)
    return layers + architecture.hidden_size + table * (1 if architecture.tie_word_embeddings else 2)


def _layer_matrices(architecture: Architecture) -> int:
    """Weights of one layer's matrices."""
    return sum(out_size * in_size for out_size, in_size in _matrix_shapes(architecture).values())


def _matrix_shapes(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of one layer's matrices."""
    hidden, intermediate = architecture.hidden_size, architecture.intermediate_size
    query = architecture.num_heads * architecture.head_dim
    key_value = architecture.num_kv_heads * architecture.head_dim
    return {
        "q_proj": (query, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
