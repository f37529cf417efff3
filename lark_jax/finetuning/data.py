"""Training data: the trajectories of each optimizer step, their weights, and how they are cut into micro-batches.

The order depends only on (seed, epoch), and a step's position in it on the step number, so a restarted run continues
with exactly the batches that it would have seen.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lark_jax.config import FinetuneConfig
from lark_jax.errors import TrainingError
from lark_jax.rendering.batching import BatchPlan
from lark_jax.rendering.chat import RenderedTrajectory
from lark_jax.rendering.packing import (
    PackedPlan,
    packed_row_lengths,
    padding_of_full_rows,
    plan_packed_micro_batches,
)
from lark_jax.rendering.row_plans import choose_row_lengths, plan_micro_batches


@dataclass(frozen=True)
class Example:
    """One trajectory and its weight w_i in Eq. 1 of the paper, scaled so that 1 is ordinary SFT."""

    rendered: RenderedTrajectory
    weight: float

    @property
    def name(self) -> str:
        return f"{self.rendered.problem_id}/{self.rendered.candidate_id}"


@dataclass(frozen=True)
class StepBatch:
    """The trajectories of one optimizer step, as indices into the training set."""

    step: int  # from 0
    epoch: int  # from 0
    members: tuple[int, ...]


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the student together, on the host. A member is an index into the training set."""

    tokens_bt: np.ndarray  # int32: the inputs
    targets_bt: np.ndarray  # int32: the token after each input
    token_weights_bt: np.ndarray  # float32: w_i / |a_i| / (trajectories of the step); 0 over prompt and padding
    members_bt: np.ndarray  # int32: the member that a target token belongs to; -1 over prompt and padding
    segment_ids_bt: np.ndarray | None = None  # int32, for packed rows; None: one trajectory per row

    def mean_losses(self, cross_entropy_bt: np.ndarray) -> dict[int, float]:
        """Member -> mean cross-entropy over its target tokens, in float64; other tokens are ignored."""
        is_target_bt = self.members_bt >= 0
        members, place = np.unique(self.members_bt[is_target_bt], return_inverse=True)
        sums = np.bincount(place, weights=cross_entropy_bt[is_target_bt].astype(np.float64))
        return dict(zip(members.tolist(), (sums / np.bincount(place)).tolist(), strict=True))


def weighted_examples(
    rendered: Sequence[RenderedTrajectory], selection_weights: Sequence[float]
) -> tuple[Example, ...]:
    """Training examples from selected trajectories and their selection weights q.

    w_i = q_i * (trajectories / problems), with one constant for the whole training set. Every problem has the same
    total weight, as in Eq. 1, and uniform q = 1 / B is ordinary SFT, where every w_i is 1.

    Raises:
      TrainingError: the training set is empty, a weight is negative or not finite, all weights are zero, or a
        trajectory has no target.
    """
    trajectories_per_problem = len(rendered) / max(1, len({trajectory.problem_id for trajectory in rendered}))
    examples = tuple(
        Example(trajectory, float(weight) * trajectories_per_problem)
        for trajectory, weight in zip(rendered, selection_weights, strict=True)
    )
    check_examples(examples)
    return examples


def check_examples(examples: Sequence[Example]) -> None:
    """Raises TrainingError, naming the record, for a training set that cannot be trained on."""
    if not examples:
        raise TrainingError("the training set is empty: no selected trajectory is left; see the selection's manifest")
    for example in examples:
        if not (np.isfinite(example.weight) and example.weight >= 0):
            raise TrainingError(
                f"{example.name}: weight {example.weight} is not a finite number >= 0; run the select stage again"
            )
        if len(example.rendered.target_tokens) == 0:
            raise TrainingError(f"{example.name}: no target tokens; leave it out of the selection")
    if all(example.weight == 0 for example in examples):
        raise TrainingError("every training weight is 0, so there is nothing to learn; run the select stage again")


@dataclass(frozen=True)
class TrainingSet:
    """Examples in the caller's order, and the rule that turns a step number into a batch of them."""

    examples: tuple[Example, ...]
    batch_size: int  # trajectories of an optimizer step
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """The last batch of an epoch may be short; its loss is divided by its own number of trajectories."""
        return -(-len(self.examples) // self.batch_size)

    def batch(self, step: int) -> StepBatch:
        """A slice of the epoch's permutation of the training set."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(len(self.examples))
        members = order[position * self.batch_size : (position + 1) * self.batch_size]
        return StepBatch(step, epoch, tuple(members.tolist()))

    def micro_batches(
        self, batch: StepBatch, *, tokens_per_batch: int, data_shards: int, pad_id: int
    ) -> Iterator[MicroBatch]:
        """Cuts one optimizer step into micro-batches of one trajectory per row, longest rows first.

        Each weight is divided by the number of trajectories of the *step*, not of the micro-batch. The sum of the
        gradients is therefore the same however the step is cut.

        Args:
          tokens_per_batch: most tokens per device, padding included; a single row may exceed it.
          data_shards: devices that the rows are split over.
        """
        for plan in self.plans(batch, tokens_per_batch=tokens_per_batch, data_shards=data_shards):
            yield self.micro_batch(plan, len(batch.members), pad_id)

    def packed_micro_batches(
        self, batch: StepBatch, *, tokens_per_batch: int, data_shards: int, pad_id: int
    ) -> Iterator[MicroBatch]:
        """Like `micro_batches`, but with several trajectories per row, separated by segment ids."""
        for plan in self.packed_plans(batch, tokens_per_batch=tokens_per_batch, data_shards=data_shards):
            yield self.packed_micro_batch(plan, len(batch.members), pad_id)

    def plans(self, batch: StepBatch, *, tokens_per_batch: int, data_shards: int) -> tuple[BatchPlan, ...]:
        """The plans of `micro_batches`."""
        return plan_micro_batches(self._lengths_of(batch), self._row_lengths, tokens_per_batch, data_shards)

    def packed_plans(self, batch: StepBatch, *, tokens_per_batch: int, data_shards: int) -> tuple[PackedPlan, ...]:
        """The plans of `packed_micro_batches`."""
        row_lengths = packed_row_lengths(self._paddings, tokens_per_batch)
        return plan_packed_micro_batches(self._lengths_of(batch), row_lengths, tokens_per_batch, data_shards)

    def micro_batch(self, plan: BatchPlan, trajectories: int, pad_id: int) -> MicroBatch:
        """The rows of `plan`, for a step of `trajectories`."""
        packed = PackedPlan(plan.length, plan.rows, tuple((member,) for member in plan.members))
        return dataclasses.replace(self.packed_micro_batch(packed, trajectories, pad_id), segment_ids_bt=None)

    def packed_micro_batch(self, plan: PackedPlan, trajectories: int, pad_id: int) -> MicroBatch:
        """The rows of `plan`, for a step of `trajectories`. Segment ids are 1, 2, ... in each row, 0 for padding."""
        shape = (plan.rows, plan.length)
        tokens_bt, targets_bt = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
        token_weights_bt, members_bt = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)
        segment_ids_bt = np.zeros(shape, np.int32)
        for row, members in enumerate(plan.members):
            start = 0
            for segment, member in enumerate(members, start=1):
                example, rendered = self.examples[member], self.examples[member].rendered
                sequence = np.concatenate([rendered.prompt_tokens, rendered.target_tokens])
                inputs = slice(start, start + rendered.num_inputs)
                targets = slice(start + len(rendered.prompt_tokens) - 1, inputs.stop)
                tokens_bt[row, inputs] = sequence[:-1]
                targets_bt[row, inputs] = sequence[1:]
                token_weights_bt[row, targets] = example.weight / len(rendered.target_tokens) / trajectories
                members_bt[row, targets] = member
                segment_ids_bt[row, inputs] = segment
                start = inputs.stop
        return MicroBatch(tokens_bt, targets_bt, token_weights_bt, members_bt, segment_ids_bt)

    def _lengths_of(self, batch: StepBatch) -> dict[int, int]:
        return {member: self._lengths[member] for member in batch.members}

    @cached_property
    def _lengths(self) -> tuple[int, ...]:
        return tuple(example.rendered.num_inputs for example in self.examples)

    @cached_property
    def _row_lengths(self) -> tuple[int, ...]:
        return choose_row_lengths(self._lengths)

    @cached_property
    def _paddings(self) -> dict[int, float]:
        return padding_of_full_rows(self._lengths)


def cut(
    data: TrainingSet, batch: StepBatch, config: FinetuneConfig, *, data_shards: int, pad_id: int
) -> tuple[MicroBatch, ...]:
    """The micro-batches of one step, packed if `config.packing`."""
    form = data.packed_micro_batches if config.packing else data.micro_batches
    return tuple(form(batch, tokens_per_batch=config.tokens_per_batch, data_shards=data_shards, pad_id=pad_id))


def hash_of_examples(examples: Sequence[Example]) -> str:
    """SHA-256 of ids, tokens and weights, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.name, example.weight)).encode())
        for tokens in (example.rendered.prompt_tokens, example.rendered.target_tokens):
            digest.update(len(tokens).to_bytes(8, "little") + np.asarray(tokens, "<i4").tobytes())
    return digest.hexdigest()
