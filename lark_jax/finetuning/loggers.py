"""Places to which a training run reports beside its own files, when it is asked to: TensorBoard, Weights & Biases.

Both packages are optional and imported only when asked for by `finetune.loggers`; nothing is sent anywhere otherwise.
"""

import functools
import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lark_jax.errors import ConfigError, one_line
from lark_jax.runtime import files

LOGS = "logs"  # folder beside metrics.jsonl


class Logger(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class RunDescription:
    """What a logger is told when a run starts or goes on."""

    name: str
    folder: Path  # of this logger alone
    completed_steps: int
    settings: Mapping[str, Any]


class TensorBoard:
    """Event files, to be looked at with `tensorboard --logdir`."""

    def __init__(self, run: RunDescription) -> None:
        import tensorboardX

        # What a killed run wrote after its last checkpoint is shown no more.
        self._writer = tensorboardX.SummaryWriter(str(run.folder), purge_step=run.completed_steps + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project that WANDB_PROJECT names, "lark_jax" without it; a restart goes on in the same run."""

    def __init__(self, run: RunDescription) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lark_jax"),
            name=run.name,
            id=_run_id(run.folder / "run_id"),
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
        )
        # Its own step only grows; ours goes back to the last checkpoint after a kill.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


@dataclass(frozen=True)
class LoggerKind:
    package: str  # as pip knows it
    module: str
    open: Callable[[RunDescription], Logger]


LOGGERS = {
    "tensorboard": LoggerKind("tensorboardX", "tensorboardX", TensorBoard),
    "wandb": LoggerKind("wandb", "wandb", WeightsAndBiases),
}


def require_installed(names: Sequence[str]) -> None:
    """Raises ConfigError, with the command to install it, for a logger whose package is not there."""
    for name in names:
        if importlib.util.find_spec(LOGGERS[name].module) is None:
            raise ConfigError(
                f"config.finetune.loggers: {name!r} needs a package that is not installed; "
                f"pip install {LOGGERS[name].package}"
            )


def loggers_of(
    names: Sequence[str], what: str, directory: Path, completed_steps: int, settings: Mapping[str, Any]
) -> list[Callable[[], Logger]]:
    """A function for each of `names` that opens its logger below `directory`, or raises ConfigError."""
    runs = [RunDescription(what, directory / LOGS / name, completed_steps, settings) for name in names]
    return [functools.partial(_opened, name, run) for name, run in zip(names, runs, strict=True)]


def _opened(name: str, run: RunDescription) -> Logger:
    try:
        return LOGGERS[name].open(run)
    except Exception as error:  # a service raises what it likes: no login, no network
        raise ConfigError(
            f"config.finetune.loggers: {name!r} cannot start: {one_line(error)}; log in or set it to work offline "
            "(WANDB_MODE=offline), or leave it out"
        ) from error


def _run_id(path: Path) -> str:
    """Made once for a training run, and kept."""
    if not path.exists():
        files.write_text(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8")
