"""How full the rows of a training run are, in the form that is used and in the other one."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lark_jax.config import FinetuneConfig
from lark_jax.finetuning.data import Example, StepBatch, TrainingSet
from lark_jax.rendering.batching import BatchPlan
from lark_jax.rendering.packing import PackedPlan

ONE_A_ROW = "one trajectory a row"
PACKED = "packed"


@dataclass(frozen=True)
class RowUse:
    """Of one epoch."""

    form: str
    tokens: int  # without padding
    padding_tokens: int
    shapes: tuple[tuple[int, int], ...]  # (row length, rows) of its micro-batches, ascending: each is compiled once

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
class RowReport:
    used: RowUse
    other: RowUse

    def __str__(self) -> str:
        return f"rows, {self.used} ({self.other})"

    def counts(self) -> dict[str, int]:
        return {"tokens per epoch": self.used.tokens, "padding tokens per epoch": self.used.padding_tokens}

    def notes(self) -> dict[str, Any]:
        forms = {use.form: {"padding": round(use.padding, 5), "shapes": len(use.shapes)} for use in self._both()}
        return {"used": self.used.form, **forms}

    def _both(self) -> tuple[RowUse, RowUse]:
        return self.used, self.other


def report_rows(examples: Sequence[Example], config: FinetuneConfig, *, seed: int, data_shards: int) -> RowReport:
    """What the first epoch of a run looks like; epochs differ in their order alone.

    Args:
      data_shards: devices that the rows are split over.
    """
    data = TrainingSet(tuple(examples), config.batch_size, seed)
    cut = {"tokens_per_batch": config.tokens_per_batch, "data_shards": data_shards}
    single = _use_of(ONE_A_ROW, data, lambda batch: data.plans(batch, **cut))
    packed = _use_of(PACKED, data, lambda batch: data.packed_plans(batch, **cut))
    return RowReport(packed, single) if config.packing else RowReport(single, packed)


def _use_of(form: str, data: TrainingSet, plans_of: Callable[[StepBatch], Iterable[BatchPlan | PackedPlan]]) -> RowUse:
    plans = [plan for step in range(data.steps_per_epoch) for plan in plans_of(data.batch(step))]
    tokens = sum(example.rendered.num_inputs for example in data.examples)
    slots = sum(plan.length * plan.rows for plan in plans)
    return RowUse(form, tokens, slots - tokens, tuple(sorted({(plan.length, plan.rows) for plan in plans})))
