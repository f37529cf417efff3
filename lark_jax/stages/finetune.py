"""Stage "finetune": weighted SFT of the student on each selection, `finetune/<method>_B<budget>/`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lark_jax import runtime
from lark_jax.config import Experiment
from lark_jax.errors import TrainingError
from lark_jax.finetuning import CHECKPOINTS, FREE_FIELDS, Example, FinetuneResult, finetune, weighted_examples
from lark_jax.finetuning.row_use import report_rows
from lark_jax.pipeline import Outcome, Task, require_manifest
from lark_jax.pool.chat import ChatFormat, RenderedTrajectory, render_trajectories
from lark_jax.pool.records import SkippedRecord
from lark_jax.selection import TRAIN_JSONL, read_training_set
from lark_jax.sharding import DATA, make_mesh
from lark_jax.stages.layout import Layout, Run
from lark_jax.stages.student import notes_on, open_chat, open_student, student_inputs
from lark_jax.students import local_folder, read_architecture
from lark_jax.students.attention import describe_backend, kernel_platform


def finetune_tasks(experiment: Experiment, layout: Layout) -> list[Task]:
    return [_finetune_task(experiment, layout, run) for run in layout.runs]


def _finetune_task(experiment: Experiment, layout: Layout, run: Run) -> Task:
    def inputs() -> dict[str, Any]:
        require_manifest(layout.selection(run), "select")
        recipe = dataclasses.asdict(experiment.finetune)
        return {
            "training_set": layout.hashes.of(layout.selection(run) / TRAIN_JSONL),
            **student_inputs(experiment, layout),
            "finetune": {name: value for name, value in recipe.items() if name not in FREE_FIELDS},
            "seed": experiment.seed,
        }

    def train(directory: Path) -> Outcome:
        chat = open_chat(experiment)
        examples = training_examples(experiment, chat, layout.selection(run))
        rows = report_rows(
            examples,
            experiment.finetune,
            seed=experiment.seed,
            row_multiple=make_mesh(experiment.mesh).shape[DATA],
        )
        runtime.say(f"{run.name}: {rows}")
        runtime.say(describe_attention(experiment, rows.used.row_lengths))
        result = finetuned(experiment, chat, examples, directory, what=run.name)
        counts = {
            "trajectories": len(examples),
            "truncated": sum(example.rendered.truncated for example in examples),
            "steps": result.steps,
            **rows.counts(),
        }
        return Outcome(counts=counts, notes={**notes_on(chat), "rows": rows.notes()})

    return Task(f"finetune/{run.name}", layout.finetune(run), inputs, train, scratch=(CHECKPOINTS,))


def training_examples(experiment: Experiment, chat: ChatFormat, selection: Path) -> tuple[Example, ...]:
    """The selected trajectories as tokens, with their weights scaled for Eq. 1.

    Raises:
      TrainingError: a selected trajectory cannot be rendered (the template changed since scoring).
    """
    training_set = read_training_set(selection)
    trajectories = [item.trajectory for item in training_set]
    rendered: list[RenderedTrajectory] = []
    for item in render_trajectories(chat, trajectories, experiment.student.max_length):
        if isinstance(item, SkippedRecord):
            raise TrainingError(f"{item.location}: {item.problem_id}/{item.candidate_id}: {item.reason}")
        rendered.append(item)
    return weighted_examples(rendered, [item.weight for item in training_set])


def describe_attention(experiment: Experiment, row_lengths: Sequence[int]) -> str:
    """What will compute the attention of rows of these lengths.

    Raises:
      ConfigError: the configured backend cannot run here, or does not honour the segment ids of packed rows.
    """
    config, architecture = experiment.finetune, read_architecture(local_folder(experiment.student.path))
    return describe_backend(
        None if config.attention == "auto" else config.attention,
        row_lengths,
        kernel_platform(make_mesh(experiment.mesh).devices.flat[0]),
        jnp.dtype(config.dtype),
        architecture.head_dim,
        packed=config.packing,
    )


def finetuned(
    experiment: Experiment, chat: ChatFormat, examples: tuple[Example, ...], directory: Path, what: str
) -> FinetuneResult:
    """Trains in `directory`, or continues there; returns at once what a finished run left there."""
    mesh = make_mesh(experiment.mesh)
    return finetune(
        open_student(experiment, mesh, "float32"),
        examples,
        experiment.finetune,
        seed=experiment.seed,
        mesh=mesh,
        pad_id=chat.pad_id,
        directory=directory,
        what=what,
    )
