"""What determines the weights and logs of a training run: a checkpoint is continued only by a run with the same."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx

from lark_jax.config import FinetuneConfig
from lark_jax.finetuning.checkpoints import RunFingerprint, checksums
from lark_jax.finetuning.data import Example, hash_of_examples
from lark_jax.runtime import files
from lark_jax.students.decoder import Decoder
from lark_jax.students.parameters import flatten_parameters

# Fields that may change when a run is continued: they affect memory, speed, logging and the rounding of sums.
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
# Fields without effect where every parameter is trained.
ADAPTER_FIELDS = ("lora_alpha", "lora_targets")
# Fields of the architecture that an older release did not have.
LATER_ARCHITECTURE_FIELDS = ("sliding_window",)


def deciding_settings(config: FinetuneConfig, holds_out: bool) -> dict[str, Any]:
    """The settings that a continued run must not change; `evaluate_every` is one of them only if data is held out."""
    free = FREE_FIELDS if holds_out else (*FREE_FIELDS, "evaluate_every")
    free = free if config.lora_rank > 0 else (*free, *ADAPTER_FIELDS)
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in free}


def run_fingerprint(
    student: Decoder, examples: Sequence[Example], held_out: Sequence[Example], config: FinetuneConfig, seed: int
) -> RunFingerprint:
    """Name of each input of the run -> its value or hash.

    The training set is hashed as tokens, so the version of the rendering need not be part of it. A fresh adapter
    follows from the seed and the settings.
    """
    # A later field is left out where a family does not use it, so that runs of an older release can be continued.
    architecture = {
        name: value
        for name, value in dataclasses.asdict(student.architecture).items()
        if name not in LATER_ARCHITECTURE_FIELDS or value is not None
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
