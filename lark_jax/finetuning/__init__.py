"""Weighted supervised fine-tuning (Eq. 1 of the paper)."""

from lark_jax.finetuning.data import Example, weighted_examples
from lark_jax.finetuning.finished_run import CHECKPOINTS, finished_student
from lark_jax.finetuning.loggers import LOGS
from lark_jax.finetuning.loop import FinetuneResult, finetune
from lark_jax.finetuning.metrics import (
    HeldOutMetrics,
    StepMetrics,
    StepTiming,
    read_held_out,
    read_metrics,
    read_timings,
)
from lark_jax.finetuning.run_fingerprint import deciding_settings

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
    "finished_student",
    "read_held_out",
    "read_metrics",
    "read_timings",
    "weighted_examples",
]
