"""How much a pass computed and how fast: a progress bar while it runs, figures when it ends."""

import datetime
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lark_jax.runtime import terminal
from lark_jax.students.flops import Rates


@dataclass(frozen=True)
class Load:
    """The work of one batch, or of many together."""

    items: int  # in the unit of the pass
    tokens: int  # inputs of the student, padding excluded
    padded_tokens: int  # padding included
    flops: float  # of the tokens that are not padding

    def __add__(self, other: "Load") -> "Load":
        return Load(
            self.items + other.items,
            self.tokens + other.tokens,
            self.padded_tokens + other.padded_tokens,
            self.flops + other.flops,
        )


NO_LOAD = Load(0, 0, 0, 0.0)


@dataclass(frozen=True)
class Throughput:
    """What one process computed in one run, without what earlier runs had finished.

    Compilation is separate: rates are over the rest of the time.
    """

    unit: str  # of the items, in the plural
    load: Load
    shapes: int  # programs that were compiled, or taken from the compilation cache
    seconds: float
    compile_seconds: float
    peak_flops: float | None  # FLOP/s of all devices of the mesh together; None if unknown

    @property
    def padding(self) -> float:
        """Share of the tokens that went through the student, in [0, 1)."""
        return 1 - self.load.tokens / self.load.padded_tokens if self.load.padded_tokens else 0.0

    @property
    def compiling(self) -> float:
        """Share of the time, in [0, 1]."""
        return self.compile_seconds / self.seconds if self.seconds else 0.0

    @property
    def rates(self) -> Rates:
        seconds = max(self.seconds - self.compile_seconds, 1e-9)
        return Rates(self.load.tokens / seconds, self.load.flops / seconds, self.peak_flops)

    def __str__(self) -> str:
        return (
            f"{self.load.items:,} {self.unit}, {self.load.tokens:,} tokens, {self.padding:.2%} padding, "
            f"{self.shapes} shapes; {self.seconds:,.1f} s, {self.compiling:.1%} of them compiling, "
            f"the rest at {self.rates}"
        )

    def notes(self) -> dict[str, Any]:
        """For a manifest."""
        return {
            self.unit: self.load.items,
            "tokens": self.load.tokens,
            "padding": round(self.padding, 5),
            "shapes": self.shapes,
            "seconds": round(self.seconds, 2),
            "compiling": round(self.compiling, 4),
            "tokens_per_second": round(self.rates.tokens_per_second, 1),
            "gflops_per_second": round(self.rates.flops_per_second / 1e9, 2),
            "model_flop_utilization": self.rates.model_flop_utilization,
        }


class Progress:
    """A bar of items with tokens/s, model FLOP utilization and time left.

    The time left is that of the FLOPs left at this run's rate: long rows come first and cost more per token.
    """

    def __init__(
        self, what: str, unit: str, *, todo: Iterable[Load], finished: Iterable[Load], peak_flops: float | None
    ) -> None:
        """
        Args:
          unit: of the items, in the plural.
          todo: the parts that this run completes.
          finished: the parts that earlier runs completed; they do not count in the rates.
        """
        self._unit = unit
        self._peak_flops = peak_flops
        self._done, self._left = NO_LOAD, sum(todo, NO_LOAD)
        self._shapes, self._compile_seconds = 0, 0.0
        self._start = time.monotonic()
        before = sum(finished, NO_LOAD).items
        self._bar = terminal.progress_bar(what=what, total=before + self._left.items, unit=unit, initial=before)
        self._bar.bar_format = (
            f"{{desc}}: {{percentage:3.0f}}%|{{bar}}| {{n_fmt}}/{{total_fmt}} {unit} [{{elapsed}}{{postfix}}]"
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def taken_over(self, load: Load) -> None:
        """A batch of a part to complete turns out to have been finished by an earlier run."""
        self._left += _negative(load)
        self._bar.update(load.items)

    def compiled(self, seconds: float) -> None:
        """A program for another shape was compiled."""
        self._shapes += 1
        self._compile_seconds += seconds

    def advance(self, load: Load) -> None:
        """A batch has come back."""
        self._done += load
        self._left += _negative(load)
        left = datetime.timedelta(seconds=round(self.seconds_left()))
        self._bar.set_postfix_str(f"{left} left, {self.throughput().rates}", refresh=False)
        self._bar.update(load.items)

    def seconds_left(self) -> float:
        """Without what is still to compile; known from the first batch on."""
        return max(self._left.flops, 0.0) / self.throughput().rates.flops_per_second

    def throughput(self) -> Throughput:
        return Throughput(
            unit=self._unit,
            load=self._done,
            shapes=self._shapes,
            seconds=time.monotonic() - self._start,
            compile_seconds=self._compile_seconds,
            peak_flops=self._peak_flops,
        )


def _negative(load: Load) -> Load:
    return Load(-load.items, -load.tokens, -load.padded_tokens, -load.flops)
