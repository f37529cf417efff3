"""Low-rank adapters (Hu et al., 2022, LoRA): a layer with W x becomes one with W x + (alpha / rank) B A x.

W stays as it came; A [rank, in] and B [out, rank] are trained. Names are those of PEFT: the matrices beside
`q_proj.weight` are `q_proj.lora_A.weight` and `q_proj.lora_B.weight`.
"""

from dataclasses import dataclass

FACTOR_A, FACTOR_B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Lora:
    """Which linear layers of every decoder layer have an adapter, and of what size."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # HF's names, of config.LORA_TARGETS

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


def is_factor(name: str) -> bool:
    """Whether the parameter of this dotted name is part of an adapter."""
    return name.endswith((FACTOR_A, FACTOR_B))


def factors_of(weight: str) -> tuple[str, str]:
    """Names of A and B beside the weight of this name."""
    layer = weight.removesuffix(".weight")
    return layer + FACTOR_A, layer + FACTOR_B


def adapted_weight(name: str) -> str:
    """The weight that factor `name` belongs to."""
    return name.removesuffix(FACTOR_A).removesuffix(FACTOR_B) + ".weight"
