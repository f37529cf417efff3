"""Optional loggers of a training run, in addition to its own files: TensorBoard and Weights & Biases.

Their packages are imported only if `finetune.loggers` names them; otherwise nothing is sent anywhere.
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

LOGS = "logs"  # folder in the folder of a run


class Logger(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class RunDescription:
    """What a logger needs when a run starts or continues."""

    name: str
    folder: Path  # for this logger only
    completed_steps: int
    settings: Mapping[str, Any]


class TensorBoard:
    """Event files for `tensorboard --logdir`."""

    def __init__(self, run: RunDescription) -> None:
        import tensorboardX

        # Hides what a killed run wrote after its last checkpoint.
        self._writer = tensorboardX.SummaryWriter(str(run.folder), purge_step=run.completed_steps + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in the project WANDB_PROJECT, by default "lark_jax"; a restart continues the same run."""

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
        # wandb's own step can only grow; ours goes back to the last checkpoint after a kill.
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
    """Raises ConfigError, with the command that installs it, if the package of a logger is missing."""
    for name in names:
        if importlib.util.find_spec(LOGGERS[name].module) is None:
            raise ConfigError(
                f"config.finetune.loggers: {name!r} needs a package that is not installed; "
                f"pip install {LOGGERS[name].package}"
            )


def loggers_of(
    names: Sequence[str], what: str, directory: Path, completed_steps: int, settings: Mapping[str, Any]
) -> list[Callable[[], Logger]]:
    """For each of `names`, a function that opens the logger below `directory` or raises ConfigError."""
    runs = [RunDescription(what, directory / LOGS / name, completed_steps, settings) for name in names]
    return [functools.partial(_opened, name, run) for name, run in zip(names, runs, strict=True)]


def _opened(name: str, run: RunDescription) -> Logger:
    try:
        return LOGGERS[name].open(run)
    except Exception as error:  # a service may raise anything: no login, no network
        raise ConfigError(
            f"config.finetune.loggers: {name!r} cannot start: {one_line(error)}; log in, work offline "
            "(WANDB_MODE=offline), or remove it"
        ) from error


def _run_id(path: Path) -> str:
    """Created once for a training run, then reused."""
    if not path.exists():
        files.write_text(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8")
