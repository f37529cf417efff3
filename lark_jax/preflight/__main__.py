"""Entry point: `python -m lark_jax.preflight --config=configs/NAME.py --topology=v5p:2x2x2 | a100-80gb:8`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

from lark_jax import files
from lark_jax.config import experiment_from_mapping
from lark_jax.errors import ConfigError, LarkError
from lark_jax.preflight.check import check
from lark_jax.preflight.cost import Assumptions
from lark_jax.preflight.lengths import find_lengths
from lark_jax.preflight.report import as_json, as_text
from lark_jax.preflight.topologies import parse_topology
from lark_jax.run import CONFIG, parse_flags
from lark_jax.students import read_architecture

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
    # Scoring is what is compiled; other stages would refuse a `tensor` axis.
    experiment = experiment_from_mapping({**CONFIG.value.to_dict(), "stages": ("score",)})
    student = ARCHITECTURE.value or experiment.student.path
    if not Path(student).exists():
        raise ConfigError(
            f"{student}: not a file or folder here; preflight downloads nothing: "
            "give --architecture=FOLDER with the student's config.json"
        )
    findings = check(
        experiment,
        read_architecture(student),
        topology,
        find_lengths(experiment, LENGTHS.value),
        Assumptions(compute=EFFICIENCY.value),
        student_name=Path(student).resolve().name,
    )
    print(as_text(findings))
    if OUT.value is not None:
        files.write_json(Path(OUT.value), as_json(findings))
    return 0 if findings.fits else EXIT_DOES_NOT_FIT


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
