"""Entry point: `python -m lark_jax.table_one [NAME=]WORKDIR ... --out=FOLDER`.

Joins the evaluated students of several working directories, one per model, into the paper's Table 1, and writes

    table_one.md, .csv, .tex   Acc@n in percent, mean±std over decoding seeds; the last needs LaTeX's package booktabs
    accuracies.csv             Acc@k for every k, whole benchmarks and levels, with intervals
    differences.md, .csv       LARK minus each other method, on the same problems, with intervals

A model's NAME is that of its folder unless one is given. Students that were asked or graded in different ways are
refused.
"""

from collections.abc import Sequence
from pathlib import Path

from lark_jax.config import expand_home
from lark_jax.errors import ConfigError, EvaluationError
from lark_jax.report.table import text_table
from lark_jax.report.table_one import table_one
from lark_jax.runtime.command import Arguments, Command, Flag
from lark_jax.stages.tables import (
    find_evaluations,
    paired_differences,
    read_students,
    require_asked_alike,
    write_tables,
)


def join(arguments: Arguments) -> int:
    """Joins, writes and prints the table."""
    found = {model: find_evaluations(workdir) for model, workdir in _models(arguments.positional).items()}
    require_asked_alike([evaluation for evaluations in found.values() for evaluation in evaluations])
    students = [student for model, evaluations in found.items() for student in read_students(model, evaluations)]
    differences = [row for model, evaluations in found.items() for row in paired_differences(model, evaluations)]
    table = table_one(students)
    write_tables(students, differences, Path(arguments.flags["out"]))
    print(text_table(table))
    return 0


def _models(arguments: Sequence[str]) -> dict[str, Path]:
    """Name -> working directory.

    Raises:
      ConfigError: there is none.
      EvaluationError: two have the same name.
    """
    if not arguments:
        raise ConfigError(f"which runs? usage: python -m {COMMAND.name} {COMMAND.usage}")
    models: dict[str, Path] = {}
    for argument in map(expand_home, arguments):
        name, equals, path = argument.partition("=")
        workdir = Path(path if equals else argument)
        model = name if equals else workdir.resolve().name
        if model in models:
            raise EvaluationError(
                f"{workdir}: {models[model]} is already called {model!r}; write NAME={workdir} to give it another name"
            )
        models[model] = workdir
    return models


COMMAND = Command(
    name="lark_jax.table_one",
    usage="[NAME=]WORKDIR ... --out=FOLDER",
    doc="Joins the evaluated students of several runs, one WORKDIR per model, into the paper's Table 1.",
    action=join,
    flags=(Flag("out", "Folder for the tables.", required=True, path=True),),
    positional=True,
)
main = COMMAND.main

if __name__ == "__main__":
    COMMAND.start()
