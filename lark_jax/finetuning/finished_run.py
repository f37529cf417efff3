"""A finished training run: the record that it leaves, and its student restored from the last checkpoint."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lark_jax.config import FinetuneConfig
from lark_jax.errors import TrainingError
from lark_jax.finetuning.checkpoints import CheckpointStore, RunFingerprint
from lark_jax.finetuning.optimizer import make_optimizer
from lark_jax.finetuning.parameter_sets import abstract_frozen, lora_of
from lark_jax.finetuning.step import abstract_state
from lark_jax.runtime import files
from lark_jax.students.architecture import Architecture
from lark_jax.students.decoder import Decoder
from lark_jax.students.parameters import abstract_decoder
from lark_jax.students.sharded import ShardedStudent

CHECKPOINTS = "checkpoints"  # folder of the checkpoints in the folder of a run
RECORD = "run.json"  # the fingerprint of a complete run; earlier releases did not write it


def record_run(directory: Path, fingerprint: RunFingerprint) -> None:
    files.write_json(directory / RECORD, {"fingerprint": fingerprint})


def finished_student(
    directory: Path, architecture: Architecture, config: FinetuneConfig, mesh: Mesh, steps: int
) -> Decoder:
    """The student that the finished run in `directory` trained, restored from the checkpoint of its last step.

    Needs neither the training set nor the student that training started from: shapes and shardings follow from
    `architecture` and `config`.

    Args:
      steps: of the complete run (`FinetuneResult.steps`).

    Returns:
      A decoder with float32 trained parameters, sharded over `mesh`. With an adapter, the frozen parameters are only
      shapes: they are those of the student that training started from.

    Raises:
      TrainingError: there is no checkpoint of the last step, or it is damaged or belongs to another run.
    """
    fingerprint = _recorded_fingerprint(directory / RECORD)
    student = ShardedStudent.abstract(abstract_decoder(architecture, config.dtype, lora=lora_of(config)), mesh)
    restored = None
    if (directory / CHECKPOINTS).is_dir():  # a store would make it
        with CheckpointStore(directory / CHECKPOINTS, fingerprint, keep=config.keep_checkpoints) as store:
            restored = store.restore_latest(abstract_state(student, make_optimizer(config, steps)))
    if restored is None:
        raise TrainingError(
            f"{directory}: its checkpoints were deleted, so there is nothing to export; delete the whole folder and "
            "run the stage 'finetune' again"
        )
    if restored.completed_steps != steps:
        remedy = (
            f"delete {directory} and run the stage 'finetune' again"
            if fingerprint is None
            else f"delete {directory / RECORD} and run the stage 'finetune' again: it trains the missing steps"
        )
        raise TrainingError(
            f"{directory / CHECKPOINTS}: the checkpoint of the last step, {steps}, is missing (the newest is of step "
            f"{restored.completed_steps}); {remedy}"
        )
    frozen: Any = abstract_frozen(student)
    return student.with_parameters({**frozen, **restored.state.parameters})


def _recorded_fingerprint(path: Path) -> RunFingerprint | None:
    if not path.is_file():
        return None
    try:
        fingerprint: RunFingerprint = files.read_json(path)["fingerprint"]
    except (ValueError, TypeError, KeyError) as error:
        raise TrainingError(f"{path}: not readable ({error}); delete it and run the stage 'finetune' again") from error
    return fingerprint
