"""One forward pass per trajectory: a `jit` + `shard_map` step over length-bucketed rows, resumable part by part."""

import dataclasses
import math
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from lark_jax import files, runtime
from lark_jax.errors import SelectionError
from lark_jax.pool.batching import BatchPlan, TokenRows, assemble, padding_fraction, plan_batches
from lark_jax.pool.chat import ChatFormat, RenderedTrajectory, render_trajectories
from lark_jax.pool.records import Pool, SkippedRecord, Trajectory
from lark_jax.scoring.reductions import TrajectoryMeans
from lark_jax.scoring.step import ScoreStep, make_score_step
from lark_jax.scoring.table import CandidateScore, read_scores, skipped_score, write_scores
from lark_jax.sharding import DATA
from lark_jax.students.decoder import Decoder

TOKENS_PER_PART = 4_000_000  # a part is what a killed run loses at most
BATCHES_IN_FLIGHT = 2  # dispatched before the oldest result is fetched


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    max_length: int  # tokens of prompt and answer
    tokens_per_batch: int  # per device
    vocab_chunk: int


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

    Finished parts are kept in `parts_directory`, in a folder named by what they hold, and taken over by the next call
    that cuts the pool into the same batches; on another number of devices the scores are computed again. A call with
    another student needs another `parts_directory`. A trajectory that cannot be rendered, or whose loss is not
    finite, has status "skipped" and its reason.
    """
    rendered = render_all(chat, pool.trajectories, options.max_length)
    scorable = [index for index, item in enumerate(rendered) if isinstance(item, RenderedTrajectory)]
    trajectories = [item for item in rendered if isinstance(item, RenderedTrajectory)]
    lengths = [item.num_inputs for item in trajectories]
    plans = plan_batches(lengths, options.tokens_per_batch, mesh.shape[DATA])
    runtime.say(_describe(plans, lengths))
    parts = split_into_parts(plans)
    folder = parts_directory / _hash_of_parts(parts, trajectories)
    step = make_score_step(student, mesh, options.vocab_chunk)

    scores: list[CandidateScore | None] = [
        skipped_score(trajectory.problem_id, trajectory.candidate_id, trajectory.teacher, item.reason)
        if isinstance(item, SkippedRecord)
        else None
        for trajectory, item in zip(pool.trajectories, rendered, strict=True)
    ]
    with runtime.progress_bar(what="score", total=sum(lengths), unit="token") as bar:
        for number, part in enumerate(parts):
            path = folder / f"part-{number:05d}.parquet"
            members = [member for plan in part for member in plan.members]
            part_scores = _finished_part(path, [trajectories[member] for member in members])
            if part_scores is None:
                part_scores = _score_part(step, part, trajectories, pool, scorable, chat.pad_id, bar)
                write_scores(path, part_scores)
            else:
                bar.update(sum(lengths[member] for member in members))
            for member, score in zip(members, part_scores, strict=True):
                scores[scorable[member]] = score
    return tuple(score for score in scores if score is not None)


def render_all(
    chat: ChatFormat, trajectories: Sequence[Trajectory], max_length: int
) -> list[RenderedTrajectory | SkippedRecord]:
    """Tokenizes every trajectory; a skipped record stands where one cannot be rendered faithfully."""
    stream = render_trajectories(chat, trajectories, max_length)
    return list(runtime.progress(stream, what="tokenize", total=len(trajectories), unit="trajectory"))


def split_into_parts(plans: Sequence[BatchPlan], tokens_per_part: int = TOKENS_PER_PART) -> list[list[BatchPlan]]:
    """Consecutive batches grouped until a part holds `tokens_per_part` tokens, padding included."""
    parts: list[list[BatchPlan]] = []
    tokens = tokens_per_part
    for plan in plans:
        if tokens >= tokens_per_part:
            parts.append([])
            tokens = 0
        parts[-1].append(plan)
        tokens += plan.rows * plan.length
    return parts


def _describe(plans: Sequence[BatchPlan], lengths: Sequence[int]) -> str:
    num_shapes = len({(plan.rows, plan.length) for plan in plans})
    return f"{len(plans):,} batches of {num_shapes} shapes, {padding_fraction(plans, lengths):.1%} padding"


def _hash_of_parts(parts: Sequence[Sequence[BatchPlan]], trajectories: Sequence[RenderedTrajectory]) -> str:
    """16 hex digits over every batch, and the ids and lengths of the trajectories that the batches refer to."""
    batches = [[dataclasses.asdict(plan) for plan in part] for part in parts]
    rows = [
        (item.problem_id, item.candidate_id, len(item.prompt_tokens), len(item.target_tokens)) for item in trajectories
    ]
    return files.sha256_of_json([batches, rows])[:16]


def _finished_part(path: Path, expected: Sequence[RenderedTrajectory]) -> tuple[CandidateScore, ...] | None:
    """The scores of an interrupted run's part; None where there are none of exactly these trajectories, in order."""
    if not path.is_file():
        return None
    try:
        scores = read_scores(path)
    except SelectionError as error:
        runtime.say(f"{error}; scoring this part again")
        return None
    names = [(score.problem_id, score.candidate_id) for score in scores]
    if names != [(item.problem_id, item.candidate_id) for item in expected]:
        runtime.say(f"{path}: holds other trajectories than expected; scoring this part again")
        return None
    return scores


def _score_part(
    step: ScoreStep,
    part: Sequence[BatchPlan],
    trajectories: Sequence[RenderedTrajectory],
    pool: Pool,
    scorable: Sequence[int],
    pad_id: int,
    bar: tqdm,
) -> tuple[CandidateScore, ...]:
    """Scores in the order of the part's members; `bar` moves with every batch."""
    by_member: dict[int, CandidateScore] = {}
    for batch, means in _pipelined(step, (assemble(trajectories, plan, pad_id) for plan in part)):
        for row, member in enumerate(batch.row_ids_b):
            if member >= 0:
                trajectory = pool.trajectories[scorable[member]]
                by_member[int(member)] = _scored(trajectory, trajectories[member], means, row)
                bar.update(trajectories[member].num_inputs)
    return tuple(by_member[member] for plan in part for member in plan.members)


def _pipelined(step: ScoreStep, batches: Iterator[TokenRows]) -> Iterator[tuple[TokenRows, TrajectoryMeans]]:
    """Runs `step` over `batches`, fetching a result only when later batches are already on their way."""
    in_flight: deque[tuple[TokenRows, TrajectoryMeans]] = deque()
    for batch in batches:
        in_flight.append((batch, step(batch)))
        if len(in_flight) > BATCHES_IN_FLIGHT:
            yield _fetched(*in_flight.popleft())
    while in_flight:
        yield _fetched(*in_flight.popleft())


def _fetched(batch: TokenRows, means: TrajectoryMeans) -> tuple[TokenRows, TrajectoryMeans]:
    return batch, jax.tree.map(np.asarray, means)


def _scored(trajectory: Trajectory, rendered: RenderedTrajectory, means: TrajectoryMeans, row: int) -> CandidateScore:
    loss, brier = float(means.loss[row]), float(means.brier[row])
    finite = math.isfinite(loss) and math.isfinite(brier)
    return CandidateScore(
        problem_id=trajectory.problem_id,
        candidate_id=trajectory.candidate_id,
        teacher=trajectory.teacher,
        num_prompt_tokens=len(rendered.prompt_tokens),
        num_target_tokens=len(rendered.target_tokens),
        truncated=rendered.truncated,
        loss=loss,
        brier=brier,
        mean_clipped_rank=float(means.mean_clipped_rank[row]),
        mean_rank=float(means.mean_rank[row]),
        target_prob=float(means.target_prob[row]),
        wrong_concentration=float(means.wrong_concentration[row]),
        status="ok" if finite else "skipped",
        reason="" if finite else "non-finite loss",
    )
