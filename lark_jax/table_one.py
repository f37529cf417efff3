"""Entry point: `python -m lark_jax.table_one [NAME=]WORKDIR ... --out=FOLDER`.

Joins the evaluated students of several working directories, one per model, into the paper's Table 1, and writes

    table_one.md, .csv, .tex   Acc@n in percent, mean±std over decoding seeds; the last needs LaTeX's package booktabs
    accuracies.csv             Acc@k for every k, whole benchmarks and levels, with intervals
    differences.md, .csv       LARK minus each other method, on the same problems, with intervals

A model's NAME is that of its folder unless one is given. Students that were asked or graded in different ways are
refused.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lark_jax.errors import EvaluationError, LarkError
from lark_jax.report.table import text_table
from lark_jax.report.table_one import table_one
from lark_jax.stages.tables import (
    find_evaluations,
    paired_differences,
    read_students,
    require_same_settings,
    write_tables,
)

EXIT_USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Joins and writes; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        found = {model: find_evaluations(workdir) for model, workdir in _models(options.workdirs).items()}
        require_same_settings([evaluation for evaluations in found.values() for evaluation in evaluations])
        students = [student for model, evaluations in found.items() for student in read_students(model, evaluations)]
        table = table_one(students)
        differences = [row for model, evaluations in found.items() for row in paired_differences(model, evaluations)]
        write_tables(students, differences, Path(options.out))
    except (LarkError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(text_table(table))
    return 0


def _models(arguments: Sequence[str]) -> dict[str, Path]:
    """Name -> working directory.

    Raises:
      EvaluationError: two have one name.
    """
    models: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        workdir = Path(path if equals else argument)
        model = name if equals else workdir.resolve().name
        if model in models:
            raise EvaluationError(f"{workdir}: the name {model!r} is that of {models[model]} too; write NAME={workdir}")
        models[model] = workdir
    return models


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lark_jax.table_one", description=str(__doc__).partition("\n")[0])
    parser.add_argument("workdirs", nargs="+", metavar="[NAME=]WORKDIR", help="as config.workdir of a finished run")
    parser.add_argument("--out", required=True, help="folder for the tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
