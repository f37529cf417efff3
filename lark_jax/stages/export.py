"""Stage "export": each fine-tuned student as a standard HF folder, `export/<method>_B<budget>/student/`.

The weights come from the run's last checkpoint; nothing is rendered, trained or loaded from the pool. An adapter is
merged into the student that it was trained on, and also saved on its own in `adapter/`, in PEFT's format.
"""

from pathlib import Path
from typing import Any

from lark_jax.config import Experiment
from lark_jax.finetuning import finished_student
from lark_jax.runtime.pipeline import Outcome, Task, require_manifest
from lark_jax.runtime.sharding import make_mesh
from lark_jax.stages.layout import ADAPTER, STUDENT, Layout, Run
from lark_jax.stages.student import open_chat
from lark_jax.students import export_adapter, export_student, local_folder, read_architecture


def export_tasks(experiment: Experiment, layout: Layout) -> list[Task]:
    return [_export_task(experiment, layout, run) for run in layout.runs]


def _export_task(experiment: Experiment, layout: Layout, run: Run) -> Task:
    def inputs() -> dict[str, Any]:
        return {"finetune": require_manifest(layout.finetune(run), "finetune").fingerprint}

    def export(directory: Path) -> Outcome:
        trained, source = layout.finetune(run), local_folder(experiment.student.path)
        chat = open_chat(experiment)
        mesh = make_mesh(experiment.mesh)
        steps = require_manifest(trained, "finetune").outcome.counts["steps"]
        student = finished_student(trained, read_architecture(source), experiment.finetune, mesh, steps)
        export_student(
            student,
            source,
            directory / STUDENT,
            end_of_turn_id=chat.end_of_turn_id,
            chat_template=None if experiment.student.chat_template is None else chat.template,
        )
        if student.lora is not None:
            export_adapter(student, experiment.student.path, directory / ADAPTER)
        return Outcome(counts={"files": sum(1 for _ in (directory / STUDENT).iterdir())})

    return Task(f"export/{run.name}", layout.export(run), inputs, export)
