"""The statistics of every trajectory under the student: one forward pass each, as a pass over the pool."""

from pathlib import Path

import pyarrow as pa
from jax.sharding import Mesh

from lark_jax.pool.records import Pool, Trajectory
from lark_jax.rendering.chat import ChatFormat
from lark_jax.runtime import terminal
from lark_jax.runtime.processes import EVERYTHING, Share
from lark_jax.runtime.sharding import DATA
from lark_jax.scoring.part_streams import PartStreams
from lark_jax.scoring.pool_pass import run_pass
from lark_jax.scoring.statistics import TrajectoryMeans
from lark_jax.scoring.step import make_score_step
from lark_jax.scoring.table import SCHEMA, CandidateScore, ScoreTable, candidate_score, skipped_score
from lark_jax.scoring.throughput import Throughput
from lark_jax.scoring.workload import RowBatch, ScoreOptions, Workload, pass_over_rows, plan_workload
from lark_jax.students.decoder import Decoder


def score_pool(
    student: Decoder,
    pool: Pool,
    chat: ChatFormat,
    *,
    mesh: Mesh,
    options: ScoreOptions,
    parts_directory: Path,
) -> tuple[CandidateScore, ...]:
    """Scores every trajectory of `pool` under `student`; one entry per trajectory, in pool order.

    Finished batches are stored in `parts_directory`, in a folder that is named by what decides the batches, and the
    next call continues from there. If the batches change, as they may with another number of devices, it starts again.
    A call with another student needs another `parts_directory`. The student keeps the layout in which it was loaded on
    `mesh`; if it is not on `mesh`, every device gets a whole copy. A trajectory that cannot be rendered, or whose loss
    is not finite, has status "skipped" and a reason. For several workers call `plan_workload`, then `score_share` in
    each, then `assemble_scores`.
    """
    workload = plan_workload(pool, chat, options, data_shards=mesh.shape[DATA], directory=parts_directory)
    terminal.say(f"to score: {workload}")
    terminal.say(f"scored {score_share(student, workload, mesh=mesh)}")
    return assemble_scores(workload)


def score_share(
    student: Decoder, workload: Workload, *, mesh: Mesh, share: Share = EVERYTHING, writes: bool = True
) -> Throughput:
    """Scores what is not finished yet of a worker's share of the parts; see `run_pass`.

    Raises:
      ConfigError: the mesh does not fit the student.
      PipelineError: the workload's token counts are not those of its texts.
    """
    options = workload.options

    def encode(batch: RowBatch, means: TrajectoryMeans) -> pa.RecordBatch:
        scores = [
            candidate_score(
                workload.pool.trajectories[member].teacher,
                rendered,
                {name: float(mean_b[row]) for name, mean_b in means.items()},
            )
            for row, (member, rendered) in enumerate(zip(batch.plan.members, batch.rows, strict=True))
        ]
        (encoded,) = ScoreTable.of(scores).table.to_batches()
        return encoded

    work = pass_over_rows(
        workload,
        student.architecture,
        _streams(workload),
        what="score",
        step=make_score_step(student, mesh, options.vocab_chunk),
        encode=encode,
    )
    return run_pass(work, mesh=mesh, share=share, writes=writes)


def assemble_scores(workload: Workload) -> tuple[CandidateScore, ...]:
    """The scores of all parts, whichever worker computed them, in pool order.

    Raises:
      PipelineError: parts are missing or not readable; names them.
    """
    scores: dict[int, CandidateScore] = {}
    for part, table in _streams(workload).read_all():
        scores.update(zip(workload.members(part), ScoreTable(table).rows(), strict=True))
    return tuple(
        scores[index] if isinstance(length, int) else _unscorable(workload.pool.trajectories[index], length)
        for index, length in enumerate(workload.lengths)
    )


def _streams(workload: Workload) -> PartStreams:
    return workload.streams("statistics", SCHEMA)


def _unscorable(trajectory: Trajectory, reason: str) -> CandidateScore:
    return skipped_score(trajectory.problem_id, trajectory.candidate_id, trajectory.teacher, reason)
