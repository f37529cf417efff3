"""What there is to score: every trajectory's length, the ladder of row lengths, batches, and parts of some batches.

All texts are tokenized once for their lengths alone, which costs a fraction of a per cent of the forward passes and
buys an exact plan: as few shapes as the bound on padding allows, the longest rows first, one batch of the whole pool
with empty rows. A part is what is rendered at once, what one of several workers takes, and one file in the end. The
plan is a function of pool, tokenizer, options and number of devices, so that a restarted run, and every worker of one
run, finds the same parts and the same batches.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lark_jax.errors import PipelineError
from lark_jax.pool.records import Pool, SkippedRecord, Trajectory
from lark_jax.rendering import RENDERING_VERSION
from lark_jax.rendering.batching import BatchPlan, plan_batches
from lark_jax.rendering.buckets import choose_buckets, useful_budget
from lark_jax.rendering.chat import ChatFormat, Prompts, RenderedTrajectory, render_trajectories
from lark_jax.rendering.token_counts import count_inputs
from lark_jax.runtime import files
from lark_jax.runtime.processes import EVERYTHING, Share

MOST_PADDING = 0.05  # of all tokens that go through the student


@dataclass(frozen=True)
class ScoreOptions:
    max_length: int  # tokens of prompt and answer
    tokens_per_batch: int  # per device, at most; small pools have smaller batches
    vocab_chunk: int
    batches_per_part: int = 16


@dataclass(frozen=True)
class Part:
    number: int
    members: tuple[int, ...]  # indices into `pool.trajectories`: batch by batch, then those that cannot be rendered
    batches: tuple[BatchPlan, ...]  # their members are indices into `members`

    @property
    def num_scorable(self) -> int:
        return sum(len(batch.members) for batch in self.batches)


@dataclass(frozen=True)
class RenderedPart:
    part: Part
    rows: tuple[RenderedTrajectory, ...]  # the scorable members
    skipped: tuple[SkippedRecord, ...]  # the others


@dataclass(frozen=True)
class Workload:
    """Everything about a scoring run but the student and the devices."""

    pool: Pool
    chat: ChatFormat
    options: ScoreOptions
    lengths: tuple[int, ...]  # inputs of each trajectory; 0 for one that cannot be rendered
    parts: tuple[Part, ...]
    folder: Path  # of the finished parts: its name is a hash of all that decides the batches

    def trajectories(self, part: Part) -> list[Trajectory]:
        return [self.pool.trajectories[member] for member in part.members]

    def part_lengths(self, part: Part) -> list[int]:
        return [self.lengths[member] for member in part.members]

    @property
    def ladder(self) -> tuple[int, ...]:
        """Row lengths of the batches, ascending; each is one shape."""
        return tuple(sorted({batch.length for part in self.parts for batch in part.batches}))

    @property
    def padding(self) -> float:
        """Share of the tokens that go through the student, in [0, 1)."""
        planned = sum(batch.rows * batch.length for part in self.parts for batch in part.batches)
        return 1.0 - sum(self.lengths) / planned if planned else 0.0

    def notes(self) -> dict[str, Any]:
        """For a manifest."""
        batches = sum(len(part.batches) for part in self.parts)
        return {
            "tokens": sum(self.lengths),
            "padding": round(self.padding, 5),
            "batches": batches,
            "row_lengths": self.ladder,
        }

    def __str__(self) -> str:
        batches = sum(len(part.batches) for part in self.parts)
        return (
            f"{len(self.lengths):,} trajectories, {sum(self.lengths):,} tokens; {batches:,} batches of "
            f"{len(self.ladder)} shapes in {len(self.parts):,} parts, {self.padding:.2%} padding"
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
    """Plans the scoring of `pool`; lengths are kept below `directory`, so that they are counted once.

    Args:
      data_shards: devices along which rows are split.
      share: this worker's; workers that plan at the same time count different texts first.
    """
    texts = hash_of_texts(pool, chat, options.max_length)
    lengths = count_inputs(pool, chat, options.max_length, folder=directory / f"lengths-{texts}", share=share)
    parts = _parts(lengths, options, data_shards)
    plan = files.sha256_of_json([texts, [asdict(part) for part in parts]])[:16]
    return Workload(pool, chat, options, lengths, parts, directory / f"parts-{plan}")


def render_part(workload: Workload, part: Part, prompts: Prompts) -> RenderedPart:
    """Tokenizes a part; `prompts` is shared by the parts of one workload.

    Raises:
      PipelineError: the lengths are not those that the plan was made from.
    """
    items = list(render_trajectories(workload.chat, workload.trajectories(part), workload.options.max_length, prompts))
    rows = tuple(item for item in items if isinstance(item, RenderedTrajectory))
    skipped = tuple(item for item in items if isinstance(item, SkippedRecord))
    planned = workload.part_lengths(part)
    if [row.num_inputs for row in rows] + [0] * len(skipped) != planned:
        raise PipelineError(f"{workload.folder.parent}: holds other token counts than this pool's; delete it")
    return RenderedPart(part, rows, skipped)


def _parts(lengths: Sequence[int], options: ScoreOptions, data_shards: int) -> tuple[Part, ...]:
    scorable = [index for index, length in enumerate(lengths) if length > 0]
    unscorable = [index for index, length in enumerate(lengths) if length == 0]
    batches = plan_pool([lengths[index] for index in scorable], options.tokens_per_batch, data_shards)
    size = options.batches_per_part
    groups = [batches[start : start + size] for start in range(0, len(batches), size)] or [()]
    parts = []
    for number, group in enumerate(groups):
        members = [scorable[member] for batch in group for member in batch.members]
        if number == len(groups) - 1:
            members += unscorable
        parts.append(Part(number, tuple(members), _renumbered(group)))
    return tuple(part for part in parts if part.members)


def plan_pool(lengths: Sequence[int], tokens_per_batch: int, data_shards: int) -> tuple[BatchPlan, ...]:
    """The batches in which a pool is scored whose trajectories have so many inputs each; arguments of `plan_batches`.

    Padding is at most `MOST_PADDING`, but for pools so small that their batches cannot be filled evenly.
    """
    if not lengths:
        return ()
    budget = useful_budget(sum(lengths), tokens_per_batch, data_shards)
    buckets = choose_buckets(lengths, budget, data_shards, MOST_PADDING)
    return plan_batches(lengths, budget, data_shards, buckets)


def _renumbered(batches: Sequence[BatchPlan]) -> tuple[BatchPlan, ...]:
    """The same batches with members 0, 1, 2, ... one after the other."""
    ends = itertools.accumulate(len(batch.members) for batch in batches)
    return tuple(
        BatchPlan(batch.length, batch.rows, tuple(range(end - len(batch.members), end)))
        for batch, end in zip(batches, ends, strict=True)
    )


def hash_of_texts(pool: Pool, chat: ChatFormat, max_length: int) -> str:
    """16 hex digits over every text and all that decides its tokens."""
    rendering = [RENDERING_VERSION, chat.template_hash, chat.tokenizer_hash, max_length]
    digest = hashlib.sha256(json.dumps(rendering).encode())
    for trajectory in pool.trajectories:
        turns = [(message.role, message.content) for message in trajectory.messages]
        digest.update(json.dumps([trajectory.problem_id, trajectory.candidate_id, turns]).encode())
    return digest.hexdigest()[:16]
