"""The plan of a scoring run: the length of every trajectory, the buckets, the batches, and parts of a few batches each.

All texts are tokenized once just for their lengths. This costs a fraction of a percent of the forward passes and makes
the plan exact: as few shapes as the bound on padding allows, the longest rows first, and only one batch of the whole
pool with empty rows. The plan is a function of pool, tokenizer, options and number of devices, so that a restarted run,
and every worker of a run, finds the same parts and the same batches.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from lark_jax.errors import PipelineError
from lark_jax.pool.records import Pool
from lark_jax.rendering import RENDERING_VERSION
from lark_jax.rendering.batching import BatchPlan, TokenRows, assemble, plan_batches
from lark_jax.rendering.buckets import choose_buckets, useful_budget
from lark_jax.rendering.chat import ChatFormat, Prompts, RenderedTrajectory, render_trajectories
from lark_jax.rendering.token_counts import count_inputs
from lark_jax.runtime import files
from lark_jax.runtime.processes import EVERYTHING, Share
from lark_jax.scoring.part_streams import PartStreams
from lark_jax.scoring.pool_pass import PoolPass
from lark_jax.scoring.throughput import NO_LOAD, Load
from lark_jax.students.architecture import Architecture
from lark_jax.students.flops import forward_flops

MOST_PADDING = 0.05  # of all tokens that go through the student

Arrays = TypeVar("Arrays")


@dataclass(frozen=True)
class ScoreOptions:
    max_length: int  # tokens of prompt and answer
    tokens_per_batch: int  # per device, at most; small pools have smaller batches
    vocab_chunk: int
    batches_per_part: int = 16


@dataclass(frozen=True)
class RowBatch:
    """A batch of a pool's trajectories, tokenized; see `pool_pass.Batch`."""

    plan: BatchPlan  # its members are indices into the pool
    rows: tuple[RenderedTrajectory, ...]  # the members
    load: Load

    @property
    def shape(self) -> tuple[int, int]:
        return self.plan.rows, self.plan.length

    def token_rows(self, pad_id: int) -> TokenRows:
        return assemble(self.rows, replace(self.plan, members=tuple(range(len(self.rows)))), pad_id)


@dataclass(frozen=True)
class Workload:
    """Everything about a pass over the trajectories of a pool except the student and the devices."""

    pool: Pool
    chat: ChatFormat
    options: ScoreOptions
    lengths: tuple[int | str, ...]  # inputs of each trajectory, or the reason why it cannot be rendered
    parts: tuple[tuple[BatchPlan, ...], ...]  # the members of a batch are indices into `pool.trajectories`
    plan: str  # hash of everything that decides the batches
    directory: Path  # for unfinished results

    def streams(self, kind: str, schema: pa.Schema) -> PartStreams:
        """For the results of a pass over these parts; `kind` names the pass."""
        return PartStreams.below(self.directory, kind, self.plan, schema, len(self.parts))

    def members(self, part: int) -> list[int]:
        """The trajectories of a part, batch after batch, as indices into the pool."""
        return [member for batch in self.parts[part] for member in batch.members]

    @property
    def tokens(self) -> int:
        return sum(length for length in self.lengths if isinstance(length, int))

    @property
    def buckets(self) -> tuple[int, ...]:
        """Row lengths of the batches, ascending; each is one shape."""
        return tuple(sorted({batch.length for part in self.parts for batch in part}))

    @property
    def padding(self) -> float:
        """Share of the tokens that go through the student, in [0, 1)."""
        planned = sum(batch.rows * batch.length for part in self.parts for batch in part)
        return 1.0 - self.tokens / planned if planned else 0.0

    def notes(self) -> dict[str, Any]:
        """For a manifest."""
        return {
            "tokens": self.tokens,
            "padding": round(self.padding, 5),
            "batches": sum(map(len, self.parts)),
            "row_lengths": self.buckets,
        }

    def __str__(self) -> str:
        return (
            f"{len(self.lengths):,} trajectories, {self.tokens:,} tokens; {sum(map(len, self.parts)):,} batches of "
            f"{len(self.buckets)} shapes in {len(self.parts):,} parts, {self.padding:.2%} padding"
        )


def plan_workload(
    pool: Pool,
    chat: ChatFormat,
    options: ScoreOptions,
    *,
    data_shards: int,
    directory: Path,
    share: Share = EVERYTHING,
) -> Workload:
    """Plans a pass over `pool`; lengths are stored below `directory`, so that they are counted once.

    Args:
      data_shards: devices along which rows are split.
      share: this worker's; workers that plan at the same time count different texts first.
    """
    texts = hash_of_texts(pool, chat, options.max_length)
    lengths = count_inputs(pool, chat, options.max_length, folder=directory / f"inputs-{texts}", share=share)
    parts = _plan_parts(lengths, options, data_shards)
    plan = files.sha256_of_json([texts, [[asdict(batch) for batch in part] for part in parts]])[:16]
    return Workload(pool, chat, options, lengths, parts, plan, directory)


def pass_over_rows(
    workload: Workload,
    architecture: Architecture,
    streams: PartStreams,
    *,
    what: str,
    step: Callable[[TokenRows], Arrays],
    encode: Callable[[RowBatch, Arrays], pa.RecordBatch],
) -> PoolPass[RowBatch, Arrays]:
    """The pass that gives every trajectory of a workload to `step`, one per row; see `PoolPass`.

    Args:
      architecture: of the student, whose forward passes weight the progress.
      streams: from `workload.streams`.
    """
    prompts: Prompts = {}
    return PoolPass(
        what=what,
        unit="trajectories",
        streams=streams,
        loads=[sum((_load(workload, architecture, batch) for batch in part), NO_LOAD) for part in workload.parts],
        render=lambda part: render_part(workload, architecture, part, prompts),
        step=lambda batch: step(batch.token_rows(workload.chat.pad_id)),
        encode=encode,
    )


def render_part(workload: Workload, architecture: Architecture, part: int, prompts: Prompts) -> list[RowBatch]:
    """Tokenizes a part; `prompts` is shared by the parts of one workload.

    Raises:
      PipelineError: the lengths are not those that the plan was made from.
    """
    members = workload.members(part)
    trajectories = [workload.pool.trajectories[member] for member in members]
    rendered = render_trajectories(workload.chat, trajectories, workload.options.max_length, prompts)
    items = dict(zip(members, rendered, strict=True))
    rows = {member: item for member, item in items.items() if isinstance(item, RenderedTrajectory)}
    if [row.num_inputs for row in rows.values()] != [workload.lengths[member] for member in members]:
        raise PipelineError(f"{workload.directory}: holds other token counts than this pool's; delete it")
    return [
        RowBatch(batch, tuple(rows[member] for member in batch.members), _load(workload, architecture, batch))
        for batch in workload.parts[part]
    ]


def plan_pool(lengths: Sequence[int], tokens_per_batch: int, data_shards: int) -> tuple[BatchPlan, ...]:
    """The batches in which trajectories with so many inputs each are scored; for the arguments see `plan_batches`.

    Padding is at most `MOST_PADDING`, except in pools so small that their batches cannot be filled evenly.
    """
    if not lengths:
        return ()
    budget = useful_budget(sum(lengths), tokens_per_batch, data_shards)
    buckets = choose_buckets(lengths, budget, data_shards, MOST_PADDING)
    return plan_batches(lengths, budget, data_shards, buckets)


def hash_of_texts(pool: Pool, chat: ChatFormat, max_length: int) -> str:
    """16 hex digits over every text and everything that decides its tokens."""
    rendering = [RENDERING_VERSION, chat.template_hash, chat.tokenizer_hash, max_length]
    digest = hashlib.sha256(json.dumps(rendering).encode())
    for trajectory in pool.trajectories:
        turns = [(message.role, message.content) for message in trajectory.messages]
        digest.update(json.dumps([trajectory.problem_id, trajectory.candidate_id, turns]).encode())
    return digest.hexdigest()[:16]


def _plan_parts(
    lengths: Sequence[int | str], options: ScoreOptions, data_shards: int
) -> tuple[tuple[BatchPlan, ...], ...]:
    scorable = {index: length for index, length in enumerate(lengths) if isinstance(length, int)}
    indices = list(scorable)
    batches = [
        replace(batch, members=tuple(indices[member] for member in batch.members))
        for batch in plan_pool(list(scorable.values()), options.tokens_per_batch, data_shards)
    ]
    size = options.batches_per_part
    return tuple(tuple(batches[start : start + size]) for start in range(0, len(batches), size))


def _load(workload: Workload, architecture: Architecture, batch: BatchPlan) -> Load:
    lengths = [length for member in batch.members if isinstance(length := workload.lengths[member], int)]
    flops = sum(forward_flops(architecture, length) for length in lengths)
    return Load(len(lengths), sum(lengths), batch.rows * batch.length, flops)
