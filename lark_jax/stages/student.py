"""The student of an experiment, opened the same way by every stage that runs it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lark_jax.config import Experiment, FinetuneConfig, ScoreConfig
from lark_jax.errors import CheckpointError, LarkError, PipelineError
from lark_jax.rendering import RENDERING_VERSION
from lark_jax.rendering.chat import ChatFormat, load_chat_format
from lark_jax.stages.layout import Layout
from lark_jax.students import Decoder, load_student, loaded_files, local_folder, read_architecture
from lark_jax.students.attention.contract import AttentionSpec
from lark_jax.students.attention.dispatch import describe_backend, kernel_platform

# Earlier releases did not record the version; their rendering was the first.
UNRECORDED = {"rendering": 1}


def student_inputs(experiment: Experiment, layout: Layout) -> dict[str, Any]:
    """The inputs of every stage that renders trajectories and runs the student."""
    return {
        "student": student_hash(layout, local_folder(experiment.student.path)),
        **rendering_inputs(experiment, layout),
        "max_length": experiment.student.max_length,
    }


def rendering_inputs(experiment: Experiment, layout: Layout) -> dict[str, Any]:
    """Inputs that determine, together with the student's tokenizer, which tokens messages become."""
    template = experiment.student.chat_template
    return {"rendering": RENDERING_VERSION, "chat_template": None if template is None else layout.hashes.of(template)}


def student_hash(layout: Layout, folder: Path, missing: type[LarkError] = PipelineError) -> str:
    """Hash of the files that are loaded; other files in the folder, such as a README, do not count."""
    return layout.hashes.of(folder, missing, loaded_files(folder))


# What the manifests of the score stage and of each selection record about the student and tokens of the scores.
SCORED_WITH = (
    "student_sha256",
    "max_length",
    "dtype",
    "tokenizer_sha256",
    "chat_template_sha256",
    "frozen_date",
    "rendering_version",
)


def scored_with(experiment: Experiment, layout: Layout, chat: ChatFormat) -> dict[str, Any]:
    """The values of `SCORED_WITH`."""
    return {
        "student_sha256": student_hash(layout, local_folder(experiment.student.path)),
        "max_length": experiment.student.max_length,
        "dtype": experiment.score.dtype,
        **notes_on(chat),
    }


def open_chat(experiment: Experiment) -> ChatFormat:
    """The chat format of the student; raises CheckpointError if its tokenizer has ids without an embedding."""
    folder = local_folder(experiment.student.path)
    chat, architecture = load_chat_format(folder, experiment.student.chat_template), read_architecture(folder)
    if chat.vocab_size > architecture.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has token ids up to {chat.vocab_size - 1}, but config.json has "
            f"vocab_size={architecture.vocab_size}; use the tokenizer that belongs to the student"
        )
    return chat


def describe_attention(
    experiment: Experiment, config: ScoreConfig | FinetuneConfig, device: jax.Device, lengths: Sequence[int] = ()
) -> str:
    """One line on the attention backend for rows of these lengths; none: they are not known yet.

    Raises:
      ConfigError: the configured backend cannot run on `device`, or does not honour the segment ids of packed rows.
    """
    architecture = read_architecture(local_folder(experiment.student.path))
    packed = isinstance(config, FinetuneConfig) and config.packing
    spec = AttentionSpec(jnp.dtype(config.dtype), architecture.head_dim, packed, architecture.sliding_window)
    backend = None if config.attention == "auto" else config.attention
    return describe_backend(backend, lengths, kernel_platform(device), spec)


def open_student(experiment: Experiment, mesh: Mesh, dtype: str) -> Decoder:
    student, _ = load_student(local_folder(experiment.student.path), mesh=mesh, dtype=dtype)
    return student


def notes_on(chat: ChatFormat) -> dict[str, Any]:
    """What a manifest records about how messages became tokens."""
    return {
        "chat_template_sha256": chat.template_hash,
        "tokenizer_sha256": chat.tokenizer_hash,
        "frozen_date": chat.frozen_date,
        "rendering_version": RENDERING_VERSION,
    }
