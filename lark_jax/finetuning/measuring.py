"""Metrics and timing of an optimizer step, computed from its outputs on the devices."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lark_jax.errors import TrainingError
from lark_jax.finetuning.data import MicroBatch, StepBatch, TrainingSet
from lark_jax.finetuning.metrics import StepMetrics, StepTiming
from lark_jax.finetuning.step import Applied
from lark_jax.runtime import environment
from lark_jax.students.decoder import Decoder
from lark_jax.students.flops import Rates, training_flops


class PreparedStep(NamedTuple):
    """The batch of an optimizer step, cut into micro-batches on the host."""

    batch: StepBatch
    micro_batches: tuple[MicroBatch, ...]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the student has been trained on so far; repeated trajectories count repeatedly."""

    trajectories: int
    target_tokens: int

    @classmethod
    def after(cls, data: TrainingSet, completed_steps: int) -> "Seen":
        epochs, steps = divmod(completed_steps, data.steps_per_epoch)
        first = epochs * data.steps_per_epoch
        members = [member for step in range(first, first + steps) for member in data.batch(step).members]
        lengths = [len(example.rendered.target_tokens) for example in data.examples]
        tokens = epochs * sum(lengths) + sum(lengths[member] for member in members)
        return cls(epochs * len(lengths) + len(members), tokens)

    @classmethod
    def with_step(cls, metrics: StepMetrics) -> "Seen":
        return cls(metrics.trajectories_seen, metrics.target_tokens_seen)


def read_step_metrics(
    data: TrainingSet,
    prepared: PreparedStep,
    applied: Applied,
    cross_entropies: Sequence[jax.Array],
    learning_rates: np.ndarray,
    before: Seen,
) -> StepMetrics:
    """Waits for the step and returns its metrics.

    Raises:
      TrainingError: its loss or gradient is not finite.
    """
    batch = prepared.batch
    losses: dict[int, float] = {}
    for micro_batch, cross_entropy_bt in zip(prepared.micro_batches, jax.device_get(cross_entropies), strict=True):
        losses |= micro_batch.mean_losses(cross_entropy_bt)
    if not bool(applied.finite):
        raise TrainingError(_describe_non_finite(data, batch, losses))
    examples = [data.examples[member] for member in batch.members]
    losses_of_members = np.array([losses[member] for member in batch.members])
    weights = np.array([example.weight for example in examples])
    target_tokens = sum(len(example.rendered.target_tokens) for example in examples)
    return StepMetrics(
        step=batch.step + 1,
        epoch=batch.epoch + 1,
        loss=float(np.mean(weights * losses_of_members)),
        unweighted_loss=float(np.mean(losses_of_members)),
        grad_norm=float(applied.grad_norm),
        learning_rate=float(learning_rates[batch.step]),
        trajectories=len(examples),
        tokens=sum(example.rendered.num_inputs for example in examples),
        target_tokens=target_tokens,
        trajectories_seen=before.trajectories + len(examples),
        target_tokens_seen=before.target_tokens + target_tokens,
    )


def rates_of(data: TrainingSet, batch: StepBatch, model: Decoder, peak_flops: float | None, seconds: float) -> Rates:
    """Rates of a step that took `seconds`. FLOPs are those of the model, without recomputation by remat."""
    lengths = [data.examples[member].rendered.num_inputs for member in batch.members]
    flops = sum(training_flops(model.architecture, length, remat="none", lora=model.lora) for length in lengths)
    return Rates(sum(lengths) / seconds, flops / seconds, peak_flops)


def timing_of(step: int, seconds: float, rates: Rates) -> StepTiming:
    utilization = rates.model_flop_utilization
    return StepTiming(
        step=step,
        seconds=round(seconds, 6),
        tokens_per_second=round(rates.tokens_per_second, 1),
        gflops_per_second=round(rates.flops_per_second / 1e9, 3),
        model_flop_utilization=None if utilization is None else round(utilization, 5),
        peak_memory_bytes=environment.peak_memory_bytes(),
    )


def describe(metrics: StepMetrics, rates: Rates, held_out_loss: float | None) -> str:
    """For the progress bar."""
    held_out = "" if held_out_loss is None else f"held-out {held_out_loss:.4f}, "
    return f"loss {metrics.loss:.4f}, {held_out}{rates}"


def _describe_non_finite(data: TrainingSet, batch: StepBatch, losses: dict[int, float]) -> str:
    where = f"step {batch.step + 1} (epoch {batch.epoch + 1})"
    culprits = [member for member in batch.members if not np.isfinite(losses[member])]
    if culprits:
        what, members = "the loss is not finite for", culprits
    else:
        what, members = "every loss is finite, but the gradient is not, for the sum over", list(batch.members)
    names = ", ".join(data.examples[member].name for member in members)
    return (
        f"{where}: {what} {names}; the step was not applied or saved; check these trajectories, or lower "
        "finetune.learning_rate"
    )
