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
RECORD = "run.json"  # what the run was and how many steps it has; written when it is complete


def record_run(directory: Path, fingerprint: RunFingerprint, steps: int) -> None:
    files.write_json(directory / RECORD, {"steps": steps, "fingerprint": fingerprint})


def finished_student(directory: Path, architecture: Architecture, config: FinetuneConfig, mesh: Mesh) -> Decoder:
    """The student that the finished run in `directory` trained, restored from the checkpoint of its last step.

    Needs neither the training set nor the student that training started from: shapes and shardings follow from
    `architecture` and `config`.

    Returns:
      A decoder with float32 trained parameters, sharded over `mesh`. With an adapter, the frozen parameters are only
      shapes: they are those of the student that training started from.

    Raises:
      TrainingError: the run is not complete, its checkpoint is damaged, belongs to another run, or is not that of the
        last step.
    """
    fingerprint, steps = _read_record(directory / RECORD)
    model = ShardedStudent.abstract(abstract_decoder(architecture, config.dtype, lora=lora_of(config)), mesh)
    optimizer = make_optimizer(config, steps)
    with CheckpointStore(directory / CHECKPOINTS, fingerprint, keep=config.keep_checkpoints) as store:
        restored = store.restore_latest(abstract_state(model, optimizer))
    if restored is None or restored.completed_steps != steps:
        found = "there is none" if restored is None else f"the newest is of step {restored.completed_steps}"
        raise TrainingError(
            f"{directory / CHECKPOINTS}: the checkpoint of the last step, {steps}, is missing ({found}); delete "
            f"{directory / RECORD} and run the stage 'finetune' again: it trains the steps that are missing"
        )
    frozen: Any = abstract_frozen(model)
    return model.with_parameters({**frozen, **restored.state.parameters})


def _read_record(path: Path) -> tuple[RunFingerprint, int]:
    if not path.is_file():
        raise TrainingError(
            f"{path.parent}: this training run is not complete; run the stage 'finetune' to complete it"
        )
    try:
        record = files.read_json(path)
        return record["fingerprint"], record["steps"]
    except (ValueError, TypeError, KeyError) as error:
        raise TrainingError(f"{path}: not readable ({error}); delete it and run the stage 'finetune' again") from error
