"""Entry point: `python -m lark_jax.run --config=configs/NAME.py [--config.FIELD=VALUE ...]`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from lark_jax import runtime
from lark_jax.config import experiment_from_mapping
from lark_jax.errors import LarkError
from lark_jax.pipeline import run_tasks
from lark_jax.stages import Layout, plan_tasks
from lark_jax.stages.report import TABLE

CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, see configs/.")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(arguments[1:])}")
    logging.set_verbosity(logging.WARNING)
    sys.exit(execute(CONFIG.value.to_dict()))


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


def execute(values: Mapping[str, Any]) -> int:
    """Runs the experiment that `values` (a config file's content) describes; returns the process's exit status.

    What the user can mend ends in one line on stderr and status 2; everything finished before stays.
    """
    try:
        experiment = experiment_from_mapping(values)
        runtime.start(compilation_cache=Path(experiment.workdir) / ".xla_cache")
        ran = run_tasks(plan_tasks(experiment))
    except (LarkError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    if ran == 0:
        runtime.say("nothing to do: every stage is up to date")
    if "report" in experiment.stages:
        print((Layout.of(experiment).report / TABLE).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
