"""The student of an experiment, as every stage that runs it opens it."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lark_jax.config import Experiment
from lark_jax.errors import CheckpointError, LarkError, PipelineError
from lark_jax.rendering.chat import ChatFormat, load_chat_format
from lark_jax.stages.layout import Layout
from lark_jax.students import Decoder, load_student, loaded_files, local_folder, read_architecture


def student_inputs(experiment: Experiment, layout: Layout) -> dict[str, Any]:
    """What every stage that turns messages into tokens and runs the student depends on."""
    template = experiment.student.chat_template
    return {
        "student": student_hash(layout, local_folder(experiment.student.path)),
        "chat_template": None if template is None else layout.hashes.of(template),
        "max_length": experiment.student.max_length,
    }


def student_hash(layout: Layout, folder: Path, missing: type[LarkError] = PipelineError) -> str:
    """Of the files that are loaded: a README beside them changes nothing.

    Raises:
      missing: there is no such folder.
    """
    return layout.hashes.of(folder, missing, loaded_files(folder))


# Notes of the score stage, and of each selection, on the student that made the scores.
SCORED_WITH = ("student_sha256", "max_length", "dtype", "tokenizer_sha256", "chat_template_sha256", "frozen_date")


def scored_with(experiment: Experiment, layout: Layout, chat: ChatFormat) -> dict[str, Any]:
    """The values of `SCORED_WITH`."""
    return {
        "student_sha256": student_hash(layout, local_folder(experiment.student.path)),
        "max_length": experiment.student.max_length,
        "dtype": experiment.score.dtype,
        **notes_on(chat),
    }


def open_chat(experiment: Experiment) -> ChatFormat:
    """The chat format of the student.

    Raises:
      CheckpointError: the tokenizer has ids for which the student has no embedding.
    """
    folder = local_folder(experiment.student.path)
    chat, architecture = load_chat_format(folder, experiment.student.chat_template), read_architecture(folder)
    if chat.vocab_size > architecture.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has token ids up to {chat.vocab_size - 1}, but config.json says "
            f"vocab_size={architecture.vocab_size}; take the tokenizer that belongs to the student"
        )
    return chat


def open_student(experiment: Experiment, mesh: Mesh, dtype: str) -> Decoder:
    student, _ = load_student(local_folder(experiment.student.path), mesh=mesh, dtype=dtype)
    return student


def notes_on(chat: ChatFormat) -> dict[str, Any]:
    """What a manifest says about how messages became tokens."""
    return {
        "chat_template_sha256": chat.template_hash,
        "tokenizer_sha256": chat.tokenizer_hash,
        "frozen_date": chat.frozen_date,
    }
