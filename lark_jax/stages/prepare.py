"""Stage "prepare" of the embedded experiment: problems, pool and tokenizer, then a pre-trained student.

The version of the rendering is not among the inputs, although pre-training renders its corpus: later stages take the
student as given, whatever it was trained on, and identify it by the hash of its files.
"""

import dataclasses
from pathlib import Path
from typing import Any

from lark_jax.config import Experiment, FinetuneConfig, SyntheticConfig
from lark_jax.errors import ConfigError
from lark_jax.finetuning import CHECKPOINTS, Example, finetune
from lark_jax.pool import read_pool
from lark_jax.pool.records import SkippedRecord
from lark_jax.pool.synthetic import write_synthetic
from lark_jax.rendering.chat import RenderedTrajectory, load_chat_format, render_trajectories
from lark_jax.runtime.pipeline import Outcome, Task, require_manifest
from lark_jax.runtime.sharding import make_mesh
from lark_jax.stages.layout import STUDENT, Layout
from lark_jax.students import random_student, read_architecture, save_new_student

PRETRAIN_TOKENS = 1_024  # per micro-batch: steps are small, and empty rows of a micro-batch cost as much as full ones


def prepare_tasks(experiment: Experiment, layout: Layout) -> list[Task]:
    synthetic = experiment.synthetic
    if synthetic is None:
        raise ConfigError("config.synthetic: not set, but the stage 'prepare' needs it")
    return [_data_task(experiment, synthetic, layout), _pretraining_task(experiment, synthetic, layout)]


def _data_task(experiment: Experiment, synthetic: SyntheticConfig, layout: Layout) -> Task:
    def inputs() -> dict[str, Any]:
        return {"synthetic": dataclasses.asdict(synthetic), "seed": experiment.seed}

    def write(directory: Path) -> Outcome:
        write_synthetic(synthetic, experiment.seed, directory)
        return Outcome(counts={"problems": synthetic.num_problems, "test problems": synthetic.num_test_problems})

    return Task("prepare/data", layout.prepared_data, inputs, write)


def _pretraining_task(experiment: Experiment, synthetic: SyntheticConfig, layout: Layout) -> Task:
    recipe = FinetuneConfig(
        learning_rate=synthetic.pretrain_learning_rate,
        epochs=synthetic.pretrain_epochs,
        batch_size=synthetic.pretrain_batch_size,
        b2=0.98,  # a short memory for a short run
        dtype="float32",
        tokens_per_batch=PRETRAIN_TOKENS,
        checkpoint_every=200,
    )

    def inputs() -> dict[str, Any]:
        data = require_manifest(layout.prepared_data, "prepare")
        return {
            "data": data.fingerprint,
            "recipe": dataclasses.asdict(recipe),
            "max_length": experiment.student.max_length,
            "seed": experiment.seed,
        }

    def pretrain(directory: Path) -> Outcome:
        blank = layout.prepared_data / STUDENT
        chat = load_chat_format(blank)
        corpus = read_pool(layout.prepared_data / "pretrain.jsonl").trajectories
        rendered = list(render_trajectories(chat, corpus, experiment.student.max_length))
        examples = [Example(item, weight=1.0) for item in rendered if isinstance(item, RenderedTrajectory)]
        refused = [dataclasses.asdict(item) for item in rendered if isinstance(item, SkippedRecord)]
        architecture = read_architecture(blank)
        mesh = make_mesh(experiment.mesh)
        result = finetune(
            random_student(architecture, experiment.seed, "float32"),
            examples,
            recipe,
            seed=experiment.seed,
            mesh=mesh,
            pad_id=chat.pad_id,
            directory=directory,
            what="pretrain",
        )
        save_new_student(result.student, blank, directory / STUDENT)
        return Outcome(counts={"trajectories": len(examples), "steps": result.steps}, skipped=refused)

    return Task("prepare/pretrain", layout.pretraining, inputs, pretrain, scratch=(CHECKPOINTS,))
