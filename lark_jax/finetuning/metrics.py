"""The logs of a training run, one JSON line per optimizer step or measurement.

`metrics.jsonl` and `held_out.jsonl` contain computed values and have the same bytes however often the run was
interrupted; `timings.jsonl` contains times and memory. Every line of the first two includes what the student has seen
so far, so that runs can be compared at equal tokens or equal trajectories.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from lark_jax.errors import TrainingError
from lark_jax.finetuning.loggers import Logger
from lark_jax.runtime import files, processes

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
HELD_OUT = "held_out.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    step: int  # completed steps, from 1
    epoch: int  # from 1
    loss: float  # Eq. 1: mean over the step's trajectories of w_i * (mean cross-entropy of i), nats per token
    unweighted_loss: float  # the same with every w_i = 1
    grad_norm: float  # of the gradient of `loss`, before clipping
    learning_rate: float
    trajectories: int
    tokens: int  # inputs of the student, without padding
    target_tokens: int  # tokens of the loss
    trajectories_seen: int  # since the first step, including this one; repeated trajectories count repeatedly
    target_tokens_seen: int


@dataclass(frozen=True)
class StepTiming:
    step: int
    seconds: float  # includes compilation in the first step with a new shape of rows
    tokens_per_second: float  # without padding
    gflops_per_second: float  # of the model: three forward passes, see `students.flops`
    model_flop_utilization: float | None  # share of the devices' bfloat16 peak; None if that is not known
    peak_memory_bytes: int  # of the first device so far, or of the process if the device does not report it


@dataclass(frozen=True)
class HeldOutMetrics:
    step: int  # completed steps; 0 before training
    loss: float  # mean over the held-out trajectories of their mean cross-entropy, nats per token; unweighted
    trajectories_seen: int  # in training
    target_tokens_seen: int


class TrainingLog:
    """Appends to the files and to the loggers in the first process; does nothing in the others.

    Opening it removes what an interrupted run wrote after its last checkpoint.

    Args:
      open_loggers: called after that.

    Raises:
      TrainingError: a file has fewer steps than the checkpoint.
    """

    def __init__(
        self, directory: Path, completed_steps: int, open_loggers: Sequence[Callable[[], Logger]] = ()
    ) -> None:
        self._streams: dict[str, TextIO] = {}
        self._loggers: list[Logger] = []
        self.held_out_losses: dict[int, float] = {}  # step -> loss, of the lines that were kept
        if not processes.is_first():
            return
        for name in (METRICS, TIMINGS, HELD_OUT):
            kept = _keep_first_steps(directory / name, completed_steps, complete=name != HELD_OUT)
            self._streams[name] = (directory / name).open("a", encoding="utf-8")
            if name == HELD_OUT:
                self.held_out_losses = {line["step"]: line["loss"] for line in kept}
        self._loggers = [open_logger() for open_logger in open_loggers]

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for stream in self._streams.values():
            stream.close()
        for logger in self._loggers:
            logger.close()

    def write(self, metrics: StepMetrics, timing: StepTiming) -> None:
        self._append(METRICS, dataclasses.asdict(metrics))
        self._append(TIMINGS, dataclasses.asdict(timing))
        values = {f"train/{name}": value for name, value in _values(metrics)}
        self._log(metrics.step, values | {f"speed/{name}": value for name, value in _values(timing)})

    def write_held_out(self, metrics: HeldOutMetrics) -> None:
        self.held_out_losses[metrics.step] = metrics.loss
        self._append(HELD_OUT, dataclasses.asdict(metrics))
        self._log(metrics.step, {"held_out/loss": metrics.loss})

    def flush_to_disk(self) -> None:
        """Call before saving a checkpoint: its steps must be in the log even after a power failure."""
        for stream in self._streams.values():
            os.fsync(stream.fileno())

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if name in self._streams:
            self._streams[name].write(json.dumps(record) + "\n")
            self._streams[name].flush()

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.log(step, values)


def read_metrics(path: Path) -> tuple[StepMetrics, ...]:
    """The steps of a finished run's `metrics.jsonl`."""
    return tuple(StepMetrics(**record) for record in _records(path))


def read_timings(path: Path) -> tuple[StepTiming, ...]:
    """The steps of a finished run's `timings.jsonl`."""
    return tuple(StepTiming(**record) for record in _records(path))


def read_held_out(path: Path) -> tuple[HeldOutMetrics, ...]:
    """The measurements of a finished run's `held_out.jsonl`; empty without a held-out set."""
    return tuple(HeldOutMetrics(**record) for record in _records(path))


def _records(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _values(record: StepMetrics | StepTiming) -> list[tuple[str, float]]:
    """All numbers except the step."""
    return [item for item in dataclasses.asdict(record).items() if item[0] != "step" and item[1] is not None]


def _keep_first_steps(path: Path, completed_steps: int, *, complete: bool) -> list[dict[str, Any]]:
    """Removes the lines of later steps and returns the others. Only the last line of a killed run can be incomplete.

    Args:
      complete: the file has a line for every step.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if complete and len(lines) < completed_steps:
        raise TrainingError(
            f"{path}: {len(lines)} lines, but the checkpoint is of step {completed_steps}; restore the file, or delete "
            f"{path.parent} to start over"
        )
    kept: list[dict[str, Any]] = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] > completed_steps:
            break
        kept.append(record)
    if complete and len(kept) != completed_steps:
        raise TrainingError(
            f"{path}: line {len(kept) + 1} is damaged; restore the file, or delete {path.parent} to start over"
        )
    files.write_text(path, "".join(line + "\n" for line in lines[: len(kept)]))
    return kept
