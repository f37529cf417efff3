"""Stage "finetune": weighted SFT of the student on each selection, `finetune/<method>_B<budget>/`."""

import dataclasses
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lark_jax.config import Experiment
from lark_jax.errors import TrainingError
from lark_jax.finetuning import (
    CHECKPOINTS,
    LOGS,
    Example,
    FinetuneResult,
    deciding_settings,
    finetune,
    read_held_out,
    read_timings,
    weighted_examples,
)
from lark_jax.finetuning.padding_report import padding_report
from lark_jax.pool.records import SkippedRecord, Trajectory
from lark_jax.rendering.chat import ChatFormat, RenderedTrajectory, render_trajectories
from lark_jax.runtime import processes, terminal
from lark_jax.runtime.pipeline import Outcome, Task, require_manifest
from lark_jax.runtime.sharding import DATA, make_mesh
from lark_jax.scoring import read_score_table
from lark_jax.selection import METHODS, TRAIN_JSONL, choose_held_out, read_training_set
from lark_jax.stages.layout import Layout, Run
from lark_jax.stages.pool import open_pool, pool_inputs
from lark_jax.stages.score import STATISTICS
from lark_jax.stages.student import UNRECORDED, describe_attention, notes_on, open_chat, open_student, student_inputs


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The training set of one run, and the held-out set that all runs of the experiment share."""

    examples: tuple[Example, ...]
    held_out: tuple[Example, ...]  # of problems that no run is trained on; weights 1


def finetune_tasks(experiment: Experiment, layout: Layout) -> list[Task]:
    return [_finetune_task(experiment, layout, run) for run in layout.runs]


def _finetune_task(experiment: Experiment, layout: Layout, run: Run) -> Task:
    def inputs() -> dict[str, Any]:
        require_manifest(layout.selection(run), "select")
        return {
            "training_set": layout.hashes.of(layout.selection(run) / TRAIN_JSONL),
            **_held_out_inputs(experiment, layout),
            **student_inputs(experiment, layout),
            "finetune": deciding_settings(experiment.finetune, experiment.finetune.held_out_fraction > 0),
            "seed": experiment.seed,
        }

    def train(directory: Path) -> Outcome:
        chat = open_chat(experiment)
        data = training_data(experiment, layout, chat, run)
        mesh = make_mesh(experiment.mesh)
        padding = padding_report(data.examples, experiment.finetune, seed=experiment.seed, data_shards=mesh.shape[DATA])
        terminal.say(f"{run.name}: {padding}")
        device, lengths = mesh.devices.flat[0], padding.used.row_lengths
        terminal.say(describe_attention(experiment, experiment.finetune, device, lengths))
        # Trained parameters need full precision; frozen ones are only computed with.
        dtype = "float32" if experiment.finetune.lora_rank == 0 else experiment.finetune.dtype
        result = finetune(
            open_student(experiment, mesh, dtype),
            data.examples,
            experiment.finetune,
            seed=experiment.seed,
            mesh=mesh,
            pad_id=chat.pad_id,
            directory=directory,
            held_out=data.held_out,
            what=run.name,
        )
        if not processes.is_first():
            return Outcome(counts={})  # the first process reports for all
        counts = {
            "trajectories": len(data.examples),
            "truncated": sum(example.rendered.truncated for example in data.examples),
            "held out": len(data.held_out),
            "steps": result.steps,
            **padding.counts(),
        }
        return Outcome(counts=counts, notes={**notes_on(chat), "rows": padding.notes(), **_measured(result)})

    folder = layout.finetune(run)
    return Task(
        f"finetune/{run.name}", folder, inputs, train, (CHECKPOINTS, LOGS), everywhere=True, unrecorded=UNRECORDED
    )


def training_data(experiment: Experiment, layout: Layout, chat: ChatFormat, run: Run) -> TrainingData:
    """The selected trajectories as tokens, with weights scaled for Eq. 1, and the held-out trajectories.

    Raises:
      TrainingError: a trajectory cannot be rendered (the chat template changed since scoring).
    """
    held_out = _held_out_trajectories(experiment, layout)
    problems = {trajectory.problem_id for trajectory in held_out}
    selected = read_training_set(layout.selection(run))
    kept = [item for item in selected if item.trajectory.problem_id not in problems]
    rendered = _rendered(experiment, chat, (item.trajectory for item in kept))
    return TrainingData(
        examples=weighted_examples(rendered, [item.weight for item in kept]),
        held_out=tuple(Example(item, weight=1.0) for item in _rendered(experiment, chat, held_out)),
    )


def _held_out_inputs(experiment: Experiment, layout: Layout) -> dict[str, Any]:
    """What the held-out set depends on (additional metrics do not matter); empty if nothing is held out."""
    if experiment.finetune.held_out_fraction == 0:
        return {}
    require_manifest(layout.statistics, "score")
    return {
        "scores": layout.hashes.of(layout.statistics / STATISTICS),
        **pool_inputs(experiment, layout),
        "draw": METHODS["random"].score.version,
    }


def _held_out_trajectories(experiment: Experiment, layout: Layout) -> list[Trajectory]:
    if experiment.finetune.held_out_fraction == 0:
        return []
    choices = choose_held_out(
        read_score_table(layout.statistics / STATISTICS), experiment.finetune.held_out_fraction, experiment.seed
    )
    by_ids = open_pool(experiment).by_ids()
    return [by_ids[choice.problem_id, choice.candidate_id] for choice in choices]


def _rendered(experiment: Experiment, chat: ChatFormat, trajectories: Iterable[Trajectory]) -> list[RenderedTrajectory]:
    rendered: list[RenderedTrajectory] = []
    for item in render_trajectories(chat, list(trajectories), experiment.student.max_length):
        if isinstance(item, SkippedRecord):
            raise TrainingError(f"{item.location}: {item.problem_id}/{item.candidate_id}: {item.reason}")
        rendered.append(item)
    return rendered


def _measured(result: FinetuneResult) -> dict[str, Any]:
    """Median throughput, which ignores the few steps that compile, and the first, last and lowest held-out loss."""
    timings = read_timings(result.timings)
    utilizations = [t.model_flop_utilization for t in timings if t.model_flop_utilization is not None]
    throughput = {
        "tokens_per_second": round(statistics.median(t.tokens_per_second for t in timings), 1),
        "gflops_per_second": round(statistics.median(t.gflops_per_second for t in timings), 2),
        "model_flop_utilization": round(statistics.median(utilizations), 4) if utilizations else None,
        "peak_memory_bytes": max(t.peak_memory_bytes for t in timings),
    }
    measured = read_held_out(result.held_out)
    if not measured:
        return {"throughput": throughput}
    best = min(measured, key=lambda held_out: held_out.loss)
    losses = {"first": measured[0].loss, "last": measured[-1].loss, "lowest": best.loss, "lowest at step": best.step}
    return {"throughput": throughput, "held_out_loss": losses}
