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
from absl import app, flags, logging
from ml_collections import config_flags

from lark_jax.config import Experiment, distributed_from_mapping, experiment_from_mapping
from lark_jax.errors import LarkError, StoppedBySignal
from lark_jax.runtime import environment, files, processes, terminal
from lark_jax.runtime.clusters import ALONE, find_place
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

CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, see configs/.")

EXIT_BUG = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(arguments[1:])}")
    logging.set_verbosity(logging.WARNING)
    values = CONFIG.value.to_dict()
    now, later = split_stages(values.get("stages"))
    status = _execute_with_the_others(values, only=now if later else ())
    if status or not later or not processes.is_first():
        sys.exit(status)
    give_back_the_accelerator(later)


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """absl's parsing; a config file that does not load, or a field that it does not have, ends in one line."""
    try:
        remaining = flags.FLAGS(arguments)
        CONFIG.value.to_dict()
        return remaining
    except flags.Error as error:
        message = str(error)
    except Exception as error:  # whatever a config file raises, it is the user's own code
        message = f"--config: {type(error).__name__}: {error}"
    sys.exit(f"error: {' '.join(message.split())}")


def execute(values: Mapping[str, Any], only: tuple[str, ...] = ()) -> int:
    """Runs the experiment that `values` (a config file's content) describes; returns the process's exit status.

    With `only`, the whole experiment is checked and these stages of it are run. Without a stage that computes, JAX
    sees the CPU alone, so that the accelerator is free for the evaluation engine, and the first process goes alone.
    What the user can mend ends in one line on stderr and status 2; everything finished before stays. A run that was
    asked to stop while it trained has saved every step: 143 after SIGTERM, 130 after SIGINT.
    """
    try:
        distributed = distributed_from_mapping(values)
        place = find_place(distributed, os.environ)
        if not _uses_accelerator(only or split_stages(values.get("stages"))[0]):
            if place.index > 0:
                return 0
            place = ALONE
            jax.config.update("jax_platforms", "cpu")
        with processes.joined(place, distributed):
            experiment = experiment_from_mapping(values)
            check_paths(experiment)
            experiment = dataclasses.replace(experiment, stages=only or experiment.stages)
            check_stages(experiment, place.count)
            ran = _run(experiment)
    except StoppedBySignal as stopped:
        terminal.say(str(stopped))
        return stopped.exit_status
    except (LarkError, OSError) as error:
        return _fail(str(error))
    except jax.errors.JaxRuntimeError as error:
        return _fail(_explain_device_error(str(error)))
    except KeyboardInterrupt:
        if processes.announce_failure("interrupted"):
            print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    if ran == 0:
        terminal.say(f"nothing to do: {', '.join(experiment.stages)} up to date")
    if "report" in experiment.stages and processes.is_first():
        print((Layout.of(experiment).report / TABLE).read_text(encoding="utf-8"))
    return 0


def _execute_with_the_others(values: Mapping[str, Any], only: tuple[str, ...]) -> int:
    """`execute`, after which this process does not outlive a failure in the company of others."""
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
    """Whether one of `stages` computes; stages that cannot be read count, until their validation says so."""
    return not stages or bool(set(stages) & set(ACCELERATOR_STAGES))


def split_stages(stages: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Stages that use the accelerator, and those that must not hold it; (all, none) where there is only one kind."""
    if not isinstance(stages, list | tuple) or not all(isinstance(stage, str) for stage in stages):
        return (), ()  # not stages at all: the validation of the configuration says so
    names = tuple(name for item in stages for name in item.split(","))
    now = tuple(name for name in names if name in ACCELERATOR_STAGES)
    later = tuple(name for name in names if name not in ACCELERATOR_STAGES)
    return (now, later) if now and later else (names, ())


def give_back_the_accelerator(stages: tuple[str, ...]) -> NoReturn:
    """Goes on with `stages` in this process's place: JAX keeps an accelerator's memory until its process ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    arguments = [*without_stages(sys.argv[1:]), f"--config.stages={','.join(stages)}"]
    command = [sys.executable, "-m", "lark_jax.run", *arguments]
    os.execv(sys.executable, command)


def without_stages(arguments: Sequence[str]) -> list[str]:
    """Command line arguments but for `--config.stages`: given twice, ml_collections joins the two."""
    kept: list[str] = []
    is_value = False
    for argument in arguments:
        name, equals, _ = argument.lstrip("-").partition("=")
        if is_value:
            is_value = False
        elif argument.startswith("-") and name == "config.stages":
            is_value = not equals
        else:
            kept.append(argument)
    return kept


def _fail(message: str) -> int:
    """Says what is wrong, unless another process has said the same."""
    line = " ".join(message.split())
    if processes.announce_failure(line):
        print(f"error: {line}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


def _explain_device_error(message: str) -> str:
    if "RESOURCE_EXHAUSTED" in message:
        return (
            "the device is out of memory; lower config.finetune.tokens_per_batch (finished steps are kept) or "
            "config.score.tokens_per_batch (other batches: scores of this stage are computed again; finished stages "
            f"are kept): {message[:300]}"
        )
    return f"the device failed: {message[:500]}"


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
