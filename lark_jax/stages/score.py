"""The first task of the stage "score": one forward pass per trajectory, `metrics/statistics/statistics.parquet`."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from lark_jax.config import Experiment
from lark_jax.errors import PipelineError, PoolError
from lark_jax.pool import Pool, SkippedRecord
from lark_jax.runtime import processes, terminal
from lark_jax.runtime.pipeline import SECONDS_TO_BE_SEEN, Outcome, Task
from lark_jax.runtime.processes import EVERYTHING, Share
from lark_jax.runtime.sharding import DATA, make_mesh
from lark_jax.scoring import (
    CandidateScore,
    ScoreOptions,
    assemble_scores,
    plan_workload,
    score_share,
    statistics,
    write_scores,
)
from lark_jax.stages.layout import Layout
from lark_jax.stages.pool import open_pool, pool_inputs, say_what_is_left_out
from lark_jax.stages.student import UNRECORDED, describe_attention, open_chat, scored_with, student_inputs
from lark_jax.students import Decoder, load_student, local_folder, lossless_dtype, read_architecture
from lark_jax.students.architecture import Architecture
from lark_jax.students.layout import choose_parameter_axes, fits_one_process, smallest_device_memory

STATISTICS = "statistics.parquet"
PARTS = "parts"
THROUGHPUT = "throughput"  # the only note that differs from run to run
# What was measured before the statistics were an input.
EARLIER = {
    **UNRECORDED,
    "statistics": ["loss", "brier", "mean_clipped_rank", "mean_rank", "target_prob", "wrong_concentration"],
}
Assembled = TypeVar("Assembled")


def statistics_task(experiment: Experiment, layout: Layout) -> Task:
    def inputs() -> dict[str, Any]:
        return {
            **pool_inputs(experiment, layout),
            **student_inputs(experiment, layout),
            "dtype": experiment.score.dtype,
            "statistics": [statistic.name for statistic in statistics.STATISTICS],
        }

    def run(directory: Path) -> Outcome:
        architecture = read_architecture(local_folder(experiment.student.path))
        place = choose_place(experiment, architecture)
        device = place.mesh.devices.flat[0]
        describe_attention(experiment, experiment.score, device)  # refused before the pool is read
        pool = open_pool(experiment)
        say_what_is_left_out(pool)
        chat = open_chat(experiment)
        options = ScoreOptions(
            max_length=experiment.student.max_length,
            tokens_per_batch=experiment.score.tokens_per_batch,
            vocab_chunk=experiment.score.vocab_chunk,
        )
        workload = plan_workload(
            pool,
            chat,
            options,
            data_shards=place.mesh.shape[DATA],
            directory=directory / PARTS,
            share=Share(processes.index(), processes.count()),
        )
        require_one_plan(workload.plan)
        terminal.say(f"to score: {workload}")
        terminal.say(describe_attention(experiment, experiment.score, device, workload.buckets))
        axes = place.parameter_axes
        terminal.say(f"parameters: {'split over ' + ' and '.join(axes) if axes else 'whole on every device'}")
        student = open_scoring_student(experiment, place)
        throughput = score_share(student, workload, mesh=place.mesh, share=place.share, writes=place.writes)
        own = f" (the share of process {processes.label()})" if place.share.count > 1 else ""
        terminal.say(f"scored {throughput}{own}")
        if own:
            terminal.say("waiting for the other processes")
        processes.barrier("score: all parts are written")
        if not processes.is_first():
            return Outcome(counts={})  # the first process reports for all
        scores = assembled_when_seen(lambda: assemble_scores(workload))
        refuse_if_nothing_scored(scores)
        write_scores(directory / STATISTICS, scores)
        measured = {**throughput.notes(), "share_of_process": processes.label() if own else None}
        notes = {**scored_with(experiment, layout, chat), "batches": workload.notes(), THROUGHPUT: measured}
        return dataclasses.replace(outcome_of(pool, scores), notes=notes)

    return Task("score/statistics", layout.statistics, inputs, run, (PARTS,), everywhere=True, unrecorded=EARLIER)


@dataclasses.dataclass(frozen=True)
class Place:
    """The mesh on which this process scores, and its share of the work."""

    mesh: Mesh
    parameter_axes: tuple[str, ...]
    share: Share
    writes: bool


def choose_place(experiment: Experiment, architecture: Architecture) -> Place:
    """A mesh over the devices of this process and its share of the work, or one mesh that spans all processes.

    The latter if the configured mesh asks for it, or if the student does not fit the devices of one process.

    Raises:
      ConfigError: the configured mesh matches neither.
    """
    parameters = experiment.score.parameters

    def decide() -> list[Any]:
        dtype = _parameter_dtype(experiment)
        is_own_mesh = fits_one_process(
            architecture,
            experiment.mesh,
            dtype,
            parameters,
            local=jax.local_devices(),
            everywhere=jax.devices(),
            device_memory_bytes=smallest_device_memory(jax.local_devices()),
        )
        mesh = make_mesh(experiment.mesh, jax.local_devices() if is_own_mesh else jax.devices())
        axes = choose_parameter_axes(architecture, mesh, dtype, parameters, smallest_device_memory(mesh.local_devices))
        return [is_own_mesh, axes]

    is_own_mesh, axes = processes.decided_by_first("score: mesh", decide)
    mesh = make_mesh(experiment.mesh, jax.local_devices() if is_own_mesh else jax.devices())
    if is_own_mesh:
        return Place(mesh, tuple(axes), Share(processes.index(), processes.count()), writes=True)
    return Place(mesh, tuple(axes), EVERYTHING, writes=processes.is_first())


def open_scoring_student(experiment: Experiment, place: Place) -> Decoder:
    backend = experiment.score.attention
    student, _ = load_student(
        local_folder(experiment.student.path),
        mesh=place.mesh,
        dtype=experiment.score.dtype,
        param_dtype=_parameter_dtype(experiment),
        parameter_axes=place.parameter_axes,
        attention_backend=None if backend == "auto" else backend,
    )
    return student


def _parameter_dtype(experiment: Experiment) -> np.dtype:
    return lossless_dtype(local_folder(experiment.student.path), experiment.score.dtype)


def require_one_plan(plan: str) -> None:
    """Refuses processes that cut the pool into different batches, before hours are spent on them."""
    of_first = processes.decided_by_first("score: plan", lambda: plan)
    if of_first != plan:
        raise PipelineError(
            f"process {processes.label()} plans other batches ({plan}) than the first process ({of_first}); all need "
            f"the same pool and the same number of devices, here {jax.local_device_count()}"
        )


def assembled_when_seen(assemble: Callable[[], Assembled]) -> Assembled:
    """The result of `assemble`, called again for a while: network file systems show other hosts' files with a delay."""
    deadline = time.monotonic() + (SECONDS_TO_BE_SEEN if processes.count() > 1 else 0)
    while True:
        try:
            return assemble()
        except PipelineError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(1)


def refuse_if_nothing_scored(scores: tuple[CandidateScore, ...]) -> None:
    """Raises PoolError if every trajectory was skipped: there would be nothing to train on."""
    skipped = [score for score in scores if score.status != "ok"]
    if len(skipped) == len(scores):
        kinds = Counter(score.reason.partition(":")[0] for score in skipped)
        listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        raise PoolError(f"none of {len(scores)} trajectories could be scored: {listed}; first: {skipped[0].reason}")


def outcome_of(pool: Pool, scores: tuple[CandidateScore, ...]) -> Outcome:
    by_ids = pool.by_ids()
    unread = [dataclasses.asdict(record) for record in (*pool.skipped, *pool.filtered)]
    unscored = [
        dataclasses.asdict(SkippedRecord(*ids, by_ids[ids].location, score.reason))
        for score in scores
        for ids in [(score.problem_id, score.candidate_id)]
        if score.status != "ok"
    ]
    counts = {
        "trajectories": len(scores),
        "scored": len(scores) - len(unscored),
        "truncated": sum(score.truncated for score in scores),
        "target tokens": sum(score.num_target_tokens for score in scores if score.status == "ok"),
    }
    return Outcome(counts=counts, skipped=unread + unscored)
