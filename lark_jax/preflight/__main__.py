"""Entry point: `python -m lark_jax.preflight --config=configs/NAME.py --topology=v5p:2x2x2 | a100-80gb:8`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from lark_jax.config import STAGES, Experiment, experiment_from_mapping
from lark_jax.errors import ConfigError, LarkError
from lark_jax.preflight.check import check
from lark_jax.preflight.cost import Assumptions
from lark_jax.preflight.lengths import find_lengths
from lark_jax.preflight.report import as_json, as_text
from lark_jax.preflight.topologies import parse_topology
from lark_jax.preflight.training import check_training
from lark_jax.preflight.training_report import training_as_json, training_as_text
from lark_jax.run import CONFIG, parse_flags
from lark_jax.runtime import files
from lark_jax.students import read_architecture

COMPILED = ("score", "finetune")  # stages
EXIT_DOES_NOT_FIT = 1
EXIT_USER_ERROR = 2

TOPOLOGY = flags.DEFINE_string("topology", "", "Hardware: v5p:2x2x2, v5e-16, a100-80gb:8, ...")
ARCHITECTURE = flags.DEFINE_string(
    "architecture", None, "Folder with config.json, or the file, in place of config.student.path; no weights needed."
)
LENGTHS = flags.DEFINE_string("lengths", None, "Lengths of the pool's rows, LENGTH:COUNT,...; default: of the pool.")
EFFICIENCY = flags.DEFINE_float("efficiency", Assumptions.compute, "Share of the peak FLOP rate that is assumed.")
OUT = flags.DEFINE_string("out", None, "JSON file for the findings.")


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(arguments[1:])}")
    logging.set_verbosity(logging.WARNING)
    try:
        sys.exit(run())
    except (LarkError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def run() -> int:
    """Prints the findings; returns the exit status: 0 where everything fits."""
    if not 0 < EFFICIENCY.value <= 1:
        raise ConfigError(f"--efficiency={EFFICIENCY.value}: expected a share above 0, at most 1")
    topology = parse_topology(TOPOLOGY.value)
    experiment = compiled_stages(CONFIG.value.to_dict())
    student = ARCHITECTURE.value or experiment.student.path
    if not Path(student).exists():
        raise ConfigError(
            f"{student}: not a file or folder here; preflight downloads nothing: "
            "give --architecture=FOLDER with the student's config.json"
        )
    architecture, lengths = read_architecture(student), find_lengths(experiment, LENGTHS.value)
    assumptions, name = Assumptions(compute=EFFICIENCY.value), Path(student).resolve().name
    values: dict[str, Any] = {}
    if "score" in experiment.stages:
        scoring = check(experiment, architecture, topology, lengths, assumptions, student_name=name)
        print(as_text(scoring))
        values |= as_json(scoring)
    if "finetune" in experiment.stages:
        training = check_training(experiment, architecture, topology, lengths, assumptions, student_name=name)
        print(training_as_text(training))
        values["finetune"] = training_as_json(training)
    if "float32" in (experiment.score.dtype, experiment.finetune.dtype):
        print("Times take the peak rates of bfloat16: where dtype is float32, computing takes 6 to 16 times as long.\n")
    values["fits"] = values.get("fits", True) and ("finetune" not in values or values["finetune"]["fits"])
    if OUT.value is not None:
        files.write_json(Path(OUT.value), values)
    return 0 if values["fits"] else EXIT_DOES_NOT_FIT


def compiled_stages(values: dict[str, Any]) -> Experiment:
    """The experiment with only those of its stages that preflight compiles.

    Raises:
      ConfigError: there are none, or a field is wrong.
    """
    asked = values.get("stages", STAGES)
    words = asked.split(",") if isinstance(asked, str) else [word for item in asked for word in item.split(",")]
    stages = tuple(stage for stage in COMPILED if stage in words)
    if not stages:
        raise ConfigError(f"config.stages: preflight compiles {' and '.join(COMPILED)}, got {','.join(words)}")
    return experiment_from_mapping({**values, "stages": stages})


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
