"""Weighted supervised fine-tuning (Eq. 1 of the paper)."""

from lark_jax.finetuning.data import Example, weighted_examples
from lark_jax.finetuning.loop import CHECKPOINTS, FREE_FIELDS, FinetuneResult, finetune
from lark_jax.finetuning.metrics import StepMetrics, read_metrics
from lark_jax.finetuning.objective import weighted_cross_entropy

__all__ = [
    "CHECKPOINTS",
    "FREE_FIELDS",
    "Example",
    "FinetuneResult",
    "StepMetrics",
    "finetune",
    "read_metrics",
    "weighted_cross_entropy",
    "weighted_examples",
]
