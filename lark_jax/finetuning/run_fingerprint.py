"""What decides the weights and logs of a training run: a checkpoint is only continued by a run with the same."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx

from lark_jax.config import FinetuneConfig
from lark_jax.finetuning.checkpoints import Identity, checksums
from lark_jax.finetuning.data import Example, hash_of_examples
from lark_jax.runtime import files
from lark_jax.students.decoder import Decoder
from lark_jax.students.parameters import flatten_parameters

# What a run may change when it is continued: these decide memory, speed and company, and how sums are rounded.
FREE_FIELDS = (
    "attention",
    "checkpoint_every",
    "keep_checkpoints",
    "loggers",
    "packing",
    "remat",
    "tokens_per_batch",
    "vocab_chunk",
)
# What decides nothing where every parameter is trained.
ADAPTER_FIELDS = ("lora_alpha", "lora_targets")


def deciding_settings(config: FinetuneConfig, holds_out: bool) -> dict[str, Any]:
    """The settings without those that a continued run may change. Where nothing is held out, when to measure is one."""
    free = FREE_FIELDS if holds_out else (*FREE_FIELDS, "evaluate_every")
    free = free if config.lora_rank > 0 else (*free, *ADAPTER_FIELDS)
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in free}


def run_identity(
    student: Decoder, examples: Sequence[Example], held_out: Sequence[Example], config: FinetuneConfig, seed: int
) -> Identity:
    """Name of each input of the run -> its value or hash. An adapter starts as seed and settings say."""
    # What a family does not use is None and left out: a new field does not change the hash of other families.
    architecture = {
        name: value for name, value in dataclasses.asdict(student.architecture).items() if value is not None
    }
    settings = {f"finetune.{name}": value for name, value in deciding_settings(config, bool(held_out)).items()}
    return {
        "seed": seed,
        "training set": hash_of_examples(examples),
        "held-out set": hash_of_examples(held_out),
        "architecture": files.sha256_of_json(architecture),
        "initial weights": files.sha256_of_json(checksums(flatten_parameters(nnx.state(student, nnx.Param)))),
        **settings,
    }
