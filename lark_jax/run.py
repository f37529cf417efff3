"""Entry point: `python -m lark_jax.run --config=configs/NAME.py [--config.FIELD=VALUE ...]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from lark_jax import runtime
from lark_jax.config import experiment_from_mapping
from lark_jax.errors import LarkError
from lark_jax.pipeline import run_tasks
from lark_jax.stages import Layout, plan_tasks
from lark_jax.stages.report import TABLE

CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, see configs/.", lock_config=True)


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(arguments[1:])}")
    try:
        experiment = experiment_from_mapping(CONFIG.value.to_dict())
        runtime.start(compilation_cache=Path(experiment.workdir) / ".xla_cache")
        ran = run_tasks(plan_tasks(experiment))
    except LarkError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if ran == 0:
        runtime.say("nothing to do: every stage is up to date")
    if "report" in experiment.stages:
        print((Layout.of(experiment).report / TABLE).read_text(encoding="utf-8"))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
