"""Low-rank adapters (LoRA, Hu et al., 2022): W x becomes W x + (alpha / rank) B A x.

W is frozen; A [rank, in] and B [out, rank] are trained. Names are PEFT's: the factors of `q_proj.weight` are
`q_proj.lora_A.weight` and `q_proj.lora_B.weight`.
"""

from dataclasses import dataclass

FACTOR_A, FACTOR_B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Lora:
    """Which linear layers of every decoder layer have an adapter, and its size."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # HF's names, of config.LORA_TARGETS

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


def is_factor(name: str) -> bool:
    """Whether the parameter with this dotted name belongs to an adapter."""
    return name.endswith((FACTOR_A, FACTOR_B))


def factors_of(weight: str) -> tuple[str, str]:
    """The names of A and B for the weight with this name."""
    layer = weight.removesuffix(".weight")
    return layer + FACTOR_A, layer + FACTOR_B


def adapted_weight(name: str) -> str:
    """The name of the weight that factor `name` adapts."""
    return name.removesuffix(FACTOR_A).removesuffix(FACTOR_B) + ".weight"
