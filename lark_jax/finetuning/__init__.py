"""Weighted supervised fine-tuning (Eq. 1 of the paper)."""

from lark_jax.finetuning.data import Example, weighted_examples
from lark_jax.finetuning.loggers import LOGS
from lark_jax.finetuning.loop import CHECKPOINTS, FinetuneResult, finetune
from lark_jax.finetuning.metrics import (
    HeldOutMetrics,
    StepMetrics,
    StepTiming,
    read_held_out,
    read_metrics,
    read_timings,
)
from lark_jax.finetuning.run_fingerprint import deciding_settings
from lark_jax.ops.weighted_cross_entropy import weighted_cross_entropy

__all__ = [
    "CHECKPOINTS",
    "LOGS",
    "Example",
    "FinetuneResult",
    "HeldOutMetrics",
    "StepMetrics",
    "StepTiming",
    "deciding_settings",
    "finetune",
    "read_held_out",
    "read_metrics",
    "read_timings",
    "weighted_cross_entropy",
    "weighted_examples",
]
