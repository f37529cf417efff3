"""Padding and shapes of a training run, with packed rows and with one trajectory per row."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lark_jax.config import FinetuneConfig
from lark_jax.finetuning.data import Example, StepBatch, TrainingSet
from lark_jax.rendering.batching import BatchPlan
from lark_jax.rendering.packing import PackedPlan

ONE_PER_ROW = "one trajectory a row"
PACKED = "packed"


@dataclass(frozen=True)
class EpochPadding:
    form: str
    tokens: int  # without padding
    padding_tokens: int
    shapes: tuple[tuple[int, int], ...]  # (row length, rows) of the micro-batches, ascending; each is compiled once

    @property
    def padding(self) -> float:
        """Share of all tokens that go through the student, in [0, 1)."""
        return self.padding_tokens / (self.tokens + self.padding_tokens)

    @property
    def row_lengths(self) -> tuple[int, ...]:
        return tuple(sorted({length for length, _ in self.shapes}))

    def __str__(self) -> str:
        return f"{self.form}: {self.padding:.1%} padding in {len(self.shapes)} shapes"


@dataclass(frozen=True)
class PaddingReport:
    used: EpochPadding
    other: EpochPadding

    def __str__(self) -> str:
        return f"rows, {self.used} ({self.other})"

    def counts(self) -> dict[str, int]:
        return {"tokens per epoch": self.used.tokens, "padding tokens per epoch": self.used.padding_tokens}

    def notes(self) -> dict[str, Any]:
        forms = {
            epoch.form: {"padding": round(epoch.padding, 5), "shapes": len(epoch.shapes)}
            for epoch in (self.used, self.other)
        }
        return {"used": self.used.form, **forms}


def padding_report(
    examples: Sequence[Example], config: FinetuneConfig, *, seed: int, data_shards: int
) -> PaddingReport:
    """Padding of the first epoch of a run; other epochs differ only in their order.

    Args:
      data_shards: devices that the rows are split over.
    """
    data = TrainingSet(tuple(examples), config.batch_size, seed)
    cut = {"tokens_per_batch": config.tokens_per_batch, "data_shards": data_shards}
    single = _first_epoch(ONE_PER_ROW, data, lambda batch: data.plans(batch, **cut))
    packed = _first_epoch(PACKED, data, lambda batch: data.packed_plans(batch, **cut))
    return PaddingReport(packed, single) if config.packing else PaddingReport(single, packed)


def _first_epoch(
    form: str, data: TrainingSet, plans_of: Callable[[StepBatch], Iterable[BatchPlan | PackedPlan]]
) -> EpochPadding:
    plans = [plan for step in range(data.steps_per_epoch) for plan in plans_of(data.batch(step))]
    tokens = sum(example.rendered.num_inputs for example in data.examples)
    slots = sum(plan.length * plan.rows for plan in plans)
    return EpochPadding(form, tokens, slots - tokens, tuple(sorted({(plan.length, plan.rows) for plan in plans})))
