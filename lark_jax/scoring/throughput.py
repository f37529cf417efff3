"""What a scoring run did and how fast: progress while it runs, figures when it ends."""

import datetime
import time
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from lark_jax.rendering.batching import BatchPlan, TokenRows
from lark_jax.runtime import terminal
from lark_jax.runtime.processes import Share
from lark_jax.scoring.part_files import Finished
from lark_jax.scoring.statistics import TrajectoryMeans
from lark_jax.scoring.step import ScoreStep
from lark_jax.scoring.workload import Part, Workload
from lark_jax.students.architecture import Architecture
from lark_jax.students.flops import Rates, forward_flops, peak_flops_of


@dataclass(frozen=True)
class Throughput:
    """Work that one process did in one run; what earlier runs had finished is not in it.

    Compiling is told apart: rates are over the time that is left without it.
    """

    trajectories: int
    tokens: int  # inputs of the student, padding excluded
    padded_tokens: int  # with it
    shapes: int  # programs that were compiled, or taken from the compilation cache
    seconds: float
    compile_seconds: float
    flops: float  # of the tokens that are not padding, see `forward_flops`
    peak_flops: float | None  # FLOP/s of all devices of the mesh together; None where it is not known

    @property
    def padding(self) -> float:
        """Share of the tokens that went through the student, in [0, 1)."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def compiling(self) -> float:
        """Share of the time, in [0, 1]."""
        return self.compile_seconds / self.seconds if self.seconds else 0.0

    @property
    def rates(self) -> Rates:
        seconds = max(self.seconds - self.compile_seconds, 1e-9)
        return Rates(self.tokens / seconds, self.flops / seconds, self.peak_flops)

    def __str__(self) -> str:
        return (
            f"{self.trajectories:,} trajectories, {self.tokens:,} tokens, {self.padding:.2%} padding, "
            f"{self.shapes} shapes; {self.seconds:,.1f} s, {self.compiling:.1%} of them compiling, "
            f"the rest at {self.rates}"
        )

    def notes(self) -> dict[str, Any]:
        """For a manifest."""
        return {
            "trajectories": self.trajectories,
            "tokens": self.tokens,
            "padding": round(self.padding, 5),
            "shapes": self.shapes,
            "seconds": round(self.seconds, 2),
            "compiling": round(self.compiling, 4),
            "tokens_per_second": round(self.rates.tokens_per_second, 1),
            "gflops_per_second": round(self.rates.flops_per_second / 1e9, 2),
            "model_flop_utilization": self.rates.model_flop_utilization,
        }


class Stopwatch:
    """A scoring step that measures how long its programs take to compile."""

    def __init__(self, step: ScoreStep) -> None:
        self._step = step
        self._shapes: set[tuple[int, ...]] = set()
        self.compile_seconds = 0.0

    @property
    def shapes(self) -> int:
        return len(self._shapes)

    def is_new(self, batch: TokenRows) -> bool:
        """Whether a program has to be compiled for it."""
        return batch.tokens_bt.shape not in self._shapes

    def __call__(self, batch: TokenRows) -> TrajectoryMeans:
        """The first call of a shape returns when its program is compiled and under way; the others return at once."""
        if not self.is_new(batch):
            return self._step(batch)
        start = time.monotonic()
        means = self._step(batch)
        self.compile_seconds += time.monotonic() - start
        self._shapes.add(batch.tokens_bt.shape)
        return means


class Progress:
    """A bar of trajectories with tokens/s, model FLOP utilisation and time left.

    The time left is that of the FLOPs left, at the rate of this run: long rows come first and cost more per token.
    """

    def __init__(self, workload: Workload, share: Share, finished: Finished, student: Architecture, mesh: Mesh) -> None:
        """Of the share, `finished` was done by earlier runs and does not count in the rates."""
        self._workload = workload
        self._student = student
        self._mesh = mesh
        self._trajectories = self._tokens = self._padded_tokens = 0
        self._flops = self._flops_left = 0.0
        already = total = 0
        for part in workload.parts:
            if not share.takes(part.number):
                continue
            total += len(part.members)
            known = finished.batches.get(part.number, frozenset())
            if part.number in finished.parts:
                already += len(part.members)
                continue
            already += len(part.members) - part.num_scorable
            for number, batch in enumerate(part.batches):
                if number in known:
                    already += len(batch.members)
                else:
                    self._flops_left += sum(self._flops_of(part, batch))
        self._start = time.monotonic()
        self._bar = terminal.progress_bar(what="score", total=total, unit="trajectory", initial=already)
        self._bar.bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} trajectories [{elapsed}{postfix}]"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, part: Part, number: int, watch: Stopwatch) -> None:
        """A batch has come back."""
        batch = part.batches[number]
        flops = sum(self._flops_of(part, batch))
        self._flops += flops
        self._flops_left -= flops
        self._trajectories += len(batch.members)
        self._tokens += sum(self._lengths_of(part, batch))
        self._padded_tokens += batch.rows * batch.length
        left = datetime.timedelta(seconds=round(self.seconds_left(watch)))
        self._bar.set_postfix_str(f"{left} left, {self.throughput(watch).rates}", refresh=False)
        self._bar.update(len(batch.members))

    def seconds_left(self, watch: Stopwatch) -> float:
        """Without what is still to compile; known from the first batch on."""
        return self._flops_left / self.throughput(watch).rates.flops_per_second

    def throughput(self, watch: Stopwatch) -> Throughput:
        return Throughput(
            trajectories=self._trajectories,
            tokens=self._tokens,
            padded_tokens=self._padded_tokens,
            shapes=watch.shapes,
            seconds=time.monotonic() - self._start,
            compile_seconds=watch.compile_seconds,
            flops=self._flops,
            peak_flops=peak_flops_of(self._mesh),
        )

    def _flops_of(self, part: Part, batch: BatchPlan) -> list[float]:
        return [forward_flops(self._student, length) for length in self._lengths_of(part, batch)]

    def _lengths_of(self, part: Part, batch: BatchPlan) -> list[int]:
        return [self._workload.lengths[part.members[member]] for member in batch.members]
