"""Entry point: `python -m lark_jax.preflight --config=configs/NAME.py --topology=v5p:2x2x2 | a100-80gb:8`."""

from pathlib import Path
from typing import Any

from lark_jax.config import STAGES, Experiment, converted, experiment_from_mapping
from lark_jax.errors import ConfigError
from lark_jax.preflight.check import Setup, check_scoring, check_training
from lark_jax.preflight.cost import Assumptions
from lark_jax.preflight.lengths import find_lengths
from lark_jax.preflight.report import scoring_as_json, scoring_as_text, training_as_json, training_as_text
from lark_jax.preflight.topologies import parse_topology
from lark_jax.runtime import files
from lark_jax.runtime.command import Arguments, Command, Flag
from lark_jax.students import read_architecture

COMPILED = ("score", "finetune")  # stages
EXIT_DOES_NOT_FIT = 1


def run(arguments: Arguments) -> int:
    """Prints the findings; returns the exit status: 0 if everything fits."""
    flags = arguments.flags
    if not 0 < flags["efficiency"] <= 1:
        raise ConfigError(f"--efficiency={flags['efficiency']}: expected a share above 0, at most 1")
    topology = parse_topology(flags["topology"])
    experiment = compiled_stages(arguments.config)
    student = flags["architecture"] or experiment.student.path
    if not Path(student).exists():
        raise ConfigError(
            f"{student}: not a file or folder here; preflight downloads nothing: "
            "give --architecture=FOLDER with the student's config.json"
        )
    setup = Setup(
        student=Path(student).resolve().name,
        architecture=read_architecture(student),
        experiment=experiment,
        topology=topology,
        lengths=find_lengths(experiment, flags["lengths"]),
        assumptions=Assumptions(compute=flags["efficiency"]),
    )
    values: dict[str, Any] = {}
    if "score" in experiment.stages:
        scoring = check_scoring(setup)
        print(scoring_as_text(scoring))
        values |= scoring_as_json(scoring)
    if "finetune" in experiment.stages:
        training = check_training(setup)
        print(training_as_text(training))
        values["finetune"] = training_as_json(training)
    if "float32" in (experiment.score.dtype, experiment.finetune.dtype):
        print("Times assume the peak rates of bfloat16; with dtype float32, compute takes 6 to 16 times as long.\n")
    values["fits"] = values.get("fits", True) and ("finetune" not in values or values["finetune"]["fits"])
    if flags["out"] is not None:
        files.write_json(Path(flags["out"]), values)
    return 0 if values["fits"] else EXIT_DOES_NOT_FIT


def compiled_stages(values: dict[str, Any]) -> Experiment:
    """The experiment with only those of its stages that preflight compiles; raises ConfigError if there are none."""
    asked = converted(tuple[str, ...], values.get("stages", STAGES), "stages")
    stages = tuple(stage for stage in asked if stage in COMPILED or stage not in STAGES)  # unknown ones are refused
    if not stages:
        raise ConfigError(f"config.stages: preflight compiles {' and '.join(COMPILED)}, got {','.join(asked)}")
    return experiment_from_mapping({**values, "stages": stages})


COMMAND = Command(
    name="lark_jax.preflight",
    usage="--config=FILE --topology=v5p:2x2x2 | a100-80gb:8 [--architecture=FOLDER] [--lengths=LENGTH:COUNT,...] "
    "[--efficiency=SHARE] [--out=FILE] [--config.FIELD=VALUE ...]",
    doc="Compiles the steps of scoring and fine-tuning for hardware that is not here, and prints what they need.",
    action=run,
    flags=(
        Flag("topology", "Hardware: v5p:2x2x2, v5e-16, a100-80gb:8, ...", required=True),
        Flag(
            "architecture",
            "Folder with config.json, or the file, in place of config.student.path; no weights needed.",
            path=True,
        ),
        Flag("lengths", "Lengths of the pool's rows, LENGTH:COUNT,...; default: those of the pool."),
        Flag("efficiency", "Share of the peak FLOP rate to assume.", Assumptions.compute),
        Flag("out", "JSON file for the findings.", path=True),
    ),
    config=(),
    config_required=True,
)

if __name__ == "__main__":
    COMMAND.start()
