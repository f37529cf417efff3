"""Stage "export": each fine-tuned student as an ordinary HF folder, `export/<method>_B<budget>/student/`.

An adapter is merged into it, and lies beside it in `adapter/` as PEFT reads it.
"""

from pathlib import Path
from typing import Any

from lark_jax.config import Experiment
from lark_jax.errors import PipelineError
from lark_jax.finetuning import CHECKPOINTS
from lark_jax.runtime.pipeline import Outcome, Task, require_manifest
from lark_jax.stages.finetune import finetuned, training_data
from lark_jax.stages.layout import ADAPTER, STUDENT, Layout, Run
from lark_jax.stages.student import open_chat
from lark_jax.students import export_adapter, export_student, local_folder


def export_tasks(experiment: Experiment, layout: Layout) -> list[Task]:
    return [_export_task(experiment, layout, run) for run in layout.runs]


def _export_task(experiment: Experiment, layout: Layout, run: Run) -> Task:
    def inputs() -> dict[str, Any]:
        return {"finetune": require_manifest(layout.finetune(run), "finetune").fingerprint}

    def export(directory: Path) -> Outcome:
        source = local_folder(experiment.student.path)
        if not (layout.finetune(run) / CHECKPOINTS).is_dir():
            raise PipelineError(
                f"{layout.finetune(run)}: its checkpoints were deleted, so there is nothing to export; delete the "
                "whole folder and run the stage 'finetune' again"
            )
        chat = open_chat(experiment)
        data = training_data(experiment, layout, chat, run)
        result = finetuned(experiment, chat, data, layout.finetune(run), what=run.name)
        export_student(
            result.student,
            source,
            directory / STUDENT,
            end_of_turn_id=chat.end_of_turn_id,
            chat_template=None if experiment.student.chat_template is None else chat.template,
        )
        if result.student.lora is not None:
            export_adapter(result.student, experiment.student.path, directory / ADAPTER)
        return Outcome(counts={"files": sum(1 for _ in (directory / STUDENT).iterdir())})

    return Task(f"export/{run.name}", layout.export(run), inputs, export)
