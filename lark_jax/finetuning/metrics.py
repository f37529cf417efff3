"""The two logs of a training run, one JSON line per optimizer step.

`metrics.jsonl` holds what is computed and is the same, byte for byte, however often the run was interrupted;
`timings.jsonl` holds what the clock says.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from lark_jax import files
from lark_jax.errors import TrainingError

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    step: int  # completed steps, from 1
    epoch: int  # from 1
    loss: float  # Eq. 1: mean over the step's trajectories of w_i * (mean cross-entropy of i), nats per token
    unweighted_loss: float  # the same with every w_i = 1
    grad_norm: float  # of the gradient of `loss`, before clipping
    learning_rate: float
    trajectories: int
    tokens: int  # that went through the student, without padding
    target_tokens: int  # that the loss is taken over


@dataclass(frozen=True)
class StepTiming:
    step: int
    seconds: float
    tokens_per_second: float  # without padding


class TrainingLog:
    """Appends to both files; when opened, forgets what an interrupted run wrote after its last checkpoint.

    Raises:
      TrainingError: a file holds fewer steps than the checkpoint.
    """

    def __init__(self, directory: Path, completed_steps: int) -> None:
        self._paths = (directory / METRICS, directory / TIMINGS)
        for path in self._paths:
            _keep_first_steps(path, completed_steps)
        self._streams: tuple[TextIO, ...] = tuple(path.open("a", encoding="utf-8") for path in self._paths)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for stream in self._streams:
            stream.close()

    def write(self, metrics: StepMetrics, timing: StepTiming) -> None:
        records = (dataclasses.asdict(metrics), dataclasses.asdict(timing))
        for stream, record in zip(self._streams, records, strict=True):
            stream.write(json.dumps(record) + "\n")
            stream.flush()

    def flush_to_disk(self) -> None:
        """Before a checkpoint: its steps must be in the log, whatever happens to the machine."""
        for stream in self._streams:
            os.fsync(stream.fileno())


def read_metrics(path: Path) -> tuple[StepMetrics, ...]:
    """The steps of a finished run's `metrics.jsonl`."""
    with path.open(encoding="utf-8") as stream:
        return tuple(StepMetrics(**json.loads(line)) for line in stream)


def _keep_first_steps(path: Path, completed_steps: int) -> None:
    """Drops the lines of later steps; only the last line of an interrupted run can be incomplete."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if len(lines) < completed_steps:
        raise TrainingError(
            f"{path}: {len(lines)} lines, but the checkpoint beside it is at step {completed_steps}; "
            f"restore the file, or delete {path.parent} to start again"
        )
    files.write_text(path, "".join(line + "\n" for line in lines[:completed_steps]))
