"""Entry point: `python -m lark_jax.run --config=configs/NAME.py [--config.FIELD=VALUE ...]`."""

import dataclasses
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import jax

from lark_jax.config import DistributedConfig, Experiment, experiment_from_mapping, section_of, split_commas
from lark_jax.errors import ConfigError
from lark_jax.runtime import environment, files, processes, terminal
from lark_jax.runtime.clusters import ALONE, find_place
from lark_jax.runtime.command import Arguments, Command, Flag, guarded
from lark_jax.runtime.pipeline import require_current, run_tasks
from lark_jax.stages import (
    ACCELERATOR_STAGES,
    Layout,
    check_paths,
    check_stages,
    earlier_tasks,
    plan_tasks,
    warn_blocked_stages,
)
from lark_jax.stages.report import TABLE

EXIT_BUG = 1


def run(arguments: Arguments) -> int:
    """Runs the stages that use the accelerator, then, as another process, those that must not hold it."""
    asked = arguments.flags["only"]
    only = () if asked is None else tuple(split_commas(asked))
    if asked is not None and not only:
        raise ConfigError(f"--only={asked}: names no stage")
    now, later = split_stages(only or arguments.config.get("stages"))
    status = _execute_with_the_others(arguments.config, only=now if only or later else ())
    if status or not later or not processes.is_first():
        return status
    release_accelerator(arguments.raw, later)


def execute(values: Mapping[str, Any], only: tuple[str, ...] = ()) -> int:
    """Runs the experiment that `values` (a config file's content) describes; returns the process's exit status.

    With `only`, the whole experiment is checked and only these stages of it are run. If none of the stages computes,
    JAX sees only the CPU, so that the accelerator is free for the evaluation engine, and only the first process runs.
    Errors that the user can fix end in one line on stderr and status 2; everything finished before stays. A run that
    was asked to stop while training has saved every step: 143 after SIGTERM, 130 after SIGINT.
    """
    return guarded(lambda: _execute(values, only))


def _execute(values: Mapping[str, Any], only: tuple[str, ...]) -> int:
    distributed = section_of(DistributedConfig, values)
    place = find_place(distributed, os.environ)
    if not _uses_accelerator(only or split_stages(values.get("stages"))[0]):
        if place.index > 0:
            return 0
        place = ALONE
        jax.config.update("jax_platforms", "cpu")
    with processes.joined(place, distributed):
        experiment = experiment_from_mapping(values)
        if not set(only) <= set(experiment.stages):
            raise ConfigError(f"--only={','.join(only)}: expected some of config.stages {','.join(experiment.stages)}")
        check_paths(experiment)
        experiment = dataclasses.replace(experiment, stages=only or experiment.stages)
        check_stages(experiment, place.count)
        ran = _run(experiment)
    if ran == 0:
        terminal.say(f"nothing to do: {', '.join(experiment.stages)} up to date")
    if "report" in experiment.stages and processes.is_first():
        print((Layout.of(experiment).report / TABLE).read_text(encoding="utf-8"))
    return 0


def _execute_with_the_others(values: Mapping[str, Any], only: tuple[str, ...]) -> int:
    """`execute`; if it fails and this is one of several processes, the process ends here."""
    try:
        status = execute(values, only)
    except Exception:
        if processes.count() == 1:
            raise
        traceback.print_exc()
        processes.announce_failure("a bug, or a library that failed; its traceback is in this process's output")
        status = EXIT_BUG
    if status:
        processes.end(status)
    return status


def _run(experiment: Experiment) -> int:
    """Runs the experiment's stages; returns how many tasks had to run. The first process keeps other runs out."""
    workdir = Path(experiment.workdir)
    lock = files.exclusive(workdir / ".lock", f"config.workdir {workdir}") if processes.is_first() else nullcontext()
    with lock:
        environment.start(compilation_cache=workdir / ".xla_cache")
        if processes.is_first():
            for task in earlier_tasks(experiment):
                require_current(task)
        warn_blocked_stages(experiment)
        return run_tasks(plan_tasks(experiment))


def _uses_accelerator(stages: tuple[str, ...]) -> bool:
    """Whether one of `stages` computes; unreadable stages count, and are refused when they are validated."""
    return not stages or bool(set(stages) & set(ACCELERATOR_STAGES))


def split_stages(stages: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Stages that use the accelerator, and those that must not hold it; (all, none) if there is only one kind."""
    if not isinstance(stages, list | tuple) or not all(isinstance(stage, str) for stage in stages):
        return (), ()  # not stages: refused when the configuration is validated
    names = tuple(split_commas(stages))
    now = tuple(name for name in names if name in ACCELERATOR_STAGES)
    later = tuple(name for name in names if name not in ACCELERATOR_STAGES)
    return (now, later) if now and later else (names, ())


def release_accelerator(arguments: Sequence[str], stages: tuple[str, ...]) -> NoReturn:
    """Replaces this process by one that runs `stages`: JAX keeps an accelerator's memory until its process ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", COMMAND.name, *arguments, f"--only={','.join(stages)}"])


COMMAND = Command(
    name="lark_jax.run",
    usage="--config=FILE [--config.FIELD=VALUE ...] [--config.stages=score,select] [--only=score]",
    doc="Runs the stages of an experiment. Interrupted or killed, the same command continues where it stopped.",
    action=run,
    flags=(Flag("only", "Stages of config.stages to run now: STAGE,STAGE. The others are checked too."),),
    config=(),
    config_required=True,
)

if __name__ == "__main__":
    COMMAND.start()
