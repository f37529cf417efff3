"""One forward pass per trajectory: parts are rendered ahead, batches are kept in flight, results are kept on disk."""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from lark_jax.errors import PipelineError, SelectionError
from lark_jax.pool.records import Pool
from lark_jax.rendering.batching import TokenRows, assemble
from lark_jax.rendering.chat import ChatFormat, Prompts
from lark_jax.runtime import processes, terminal
from lark_jax.runtime.processes import EVERYTHING, Share
from lark_jax.runtime.sharding import DATA
from lark_jax.scoring.ahead import computed_ahead
from lark_jax.scoring.part_files import Finished, NoRecord, PartRecord, read_finished, read_part
from lark_jax.scoring.statistics import TrajectoryMeans
from lark_jax.scoring.step import make_score_step
from lark_jax.scoring.table import CandidateScore, candidate_score
from lark_jax.scoring.throughput import Progress, Stopwatch, Throughput
from lark_jax.scoring.workload import RenderedPart, ScoreOptions, Workload, plan_workload, render_part
from lark_jax.students.decoder import Decoder

BATCHES_IN_FLIGHT = 2  # dispatched before the oldest result is fetched


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

    Finished work is kept in `parts_directory`, in a folder named by what decides the batches, and taken over by the
    next call; on another number of devices the scores are computed again. A call with another student needs another
    `parts_directory`. A trajectory that cannot be rendered, or whose loss is not finite, has status "skipped" and its
    reason. Several workers: `plan_workload`, then `score_share` in each, then `assemble_scores`.
    """
    workload = plan_workload(pool, chat, options, data_shards=mesh.shape[DATA], directory=parts_directory)
    terminal.say(f"to score: {workload}")
    terminal.say(f"scored {score_share(student, workload, mesh=mesh)}")
    return assemble_scores(workload)


def score_share(
    student: Decoder, workload: Workload, *, mesh: Mesh, share: Share = EVERYTHING, writes: bool = True
) -> Throughput:
    """Scores the parts of a worker's share that are not finished yet, and leaves one file for each.

    Workers with their own meshes need not know of each other. In a mesh that spans several processes, each of them
    calls this with the same share; the first one says what is finished already, and one of them `writes`.

    Raises:
      ConfigError: the mesh does not fit the student.
      PipelineError: token counts of the workload are not those of its texts.
    """
    finished = _agree_on_finished(workload, mesh, share)
    options = workload.options
    step = make_score_step(student, mesh, options.vocab_chunk)
    watch = Stopwatch(step)
    with Progress(workload, share, finished, student.architecture, mesh) as progress, ExitStack() as records:
        todo = _todo(workload, share, finished, records, writes=writes)
        for batch, means in _pipelined(watch, todo):
            batch.record.add(batch.number, batch.scores(workload, means))
            if batch.is_last:
                batch.record.finish()
            progress.advance(batch.rendered.part, batch.number, watch)
        throughput = progress.throughput(watch)
    return throughput


def assemble_scores(workload: Workload) -> tuple[CandidateScore, ...]:
    """The scores of all parts, by whichever worker, in pool order.

    Raises:
      PipelineError: parts are missing or not readable; names them.
    """
    scores: dict[int, CandidateScore] = {}
    missing = []
    for part in workload.parts:
        try:
            scores.update(zip(part.members, read_part(workload, part), strict=True))
        except (PipelineError, SelectionError) as error:
            missing.append(str(error))
    if missing:
        raise PipelineError(
            f"{len(missing)} of {len(workload.parts)} parts of the score table are missing; start the same command "
            f"again, in as many processes as before: {'; '.join(missing[:3])}"
        )
    return tuple(scores[index] for index in range(len(workload.pool.trajectories)))


@dataclass(frozen=True)
class _Batch:
    """One batch on its way through the student, and where its scores go."""

    rendered: RenderedPart
    number: int  # within its part
    is_last: bool  # of those of its part that are still to do
    record: PartRecord | NoRecord

    def token_rows(self, pad_id: int) -> TokenRows:
        return assemble(self.rendered.rows, self.rendered.part.batches[self.number], pad_id)

    def scores(self, workload: Workload, means: TrajectoryMeans) -> list[CandidateScore]:
        part = self.rendered.part
        members = part.batches[self.number].members
        return [
            candidate_score(
                workload.pool.trajectories[part.members[member]].teacher,
                self.rendered.rows[member],
                {name: float(mean_b[row]) for name, mean_b in means.items()},
            )
            for row, member in enumerate(members)
        ]


def _agree_on_finished(workload: Workload, mesh: Mesh, share: Share) -> Finished:
    if not mesh.is_multi_process:
        return read_finished(workload, share)
    name = f"scored before, {workload.folder.name}"
    return Finished.from_json(processes.decided_by_first(name, lambda: read_finished(workload, share).to_json()))


def _todo(
    workload: Workload, share: Share, finished: Finished, records: ExitStack, *, writes: bool
) -> Iterator[tuple[_Batch, TokenRows]]:
    """Every batch of the share that is not finished, rendered; a part without such batches is closed on the way."""
    prompts: Prompts = {}
    parts = [part for part in workload.parts if share.takes(part.number) and part.number not in finished.parts]
    for rendered in computed_ahead(lambda part: render_part(workload, part, prompts), parts):
        known = finished.batches.get(rendered.part.number, frozenset())
        record = PartRecord(workload, rendered, known) if writes else NoRecord()
        records.enter_context(record)
        numbers = [number for number in range(len(rendered.part.batches)) if number not in known]
        if not numbers:
            record.finish()
        for number in numbers:
            batch = _Batch(rendered, number, number == numbers[-1], record)
            yield batch, batch.token_rows(workload.chat.pad_id)


def _pipelined(
    step: Stopwatch, batches: Iterator[tuple[_Batch, TokenRows]]
) -> Iterator[tuple[_Batch, TrajectoryMeans]]:
    """Runs `step` over batches, fetching a result only when later batches are already on their way to the devices.

    Compiling a new shape may take a minute. Before it everything is fetched and on disk, so that a kill loses nothing
    and the time is not mixed up with that of batches in flight.
    """
    in_flight: deque[tuple[_Batch, TrajectoryMeans]] = deque()
    for batch, rows in batches:
        if step.is_new(rows):
            while in_flight:
                earlier, means = in_flight.popleft()
                yield _fetched(earlier, means)
                earlier.record.save()
        in_flight.append((batch, step(rows)))
        if len(in_flight) > BATCHES_IN_FLIGHT:
            yield _fetched(*in_flight.popleft())
    while in_flight:
        yield _fetched(*in_flight.popleft())


def _fetched(batch: _Batch, means: TrajectoryMeans) -> tuple[_Batch, TrajectoryMeans]:
    return batch, jax.tree.map(np.asarray, means)
