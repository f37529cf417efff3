"""Does a student learn from a real pool, and do the weights matter? One selection, three weightings, three curves.

    python scripts/make_random_student.py --tokenizer=FOLDER --out=STUDENT
    python scripts/learning_is_real.py --pool=POOL.jsonl --student=STUDENT --out=FOLDER [--problems=100] [--epochs=4]

Scores the first problems of the pool, selects by LARK, holds out some problems, and trains the same student on the same
trajectories in the same order with LARK's weights, with equal ones, and with each problem's weights in reversed order.
`FOLDER/report/index.html` has the curves; the table is printed. Exit status 1 if a held-out loss did not fall or two
runs ended with the same one.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lark_jax.config import Experiment, experiment_from_mapping
from lark_jax.finetuning import Example, FinetuneResult, finetune, read_held_out
from lark_jax.report import ReportContent, write_report
from lark_jax.report.losses import loss_table
from lark_jax.report.table import text_table
from lark_jax.runtime import files
from lark_jax.runtime.pipeline import run_tasks
from lark_jax.runtime.sharding import make_mesh
from lark_jax.stages import plan_tasks
from lark_jax.stages.finetune import training_data
from lark_jax.stages.layout import Layout
from lark_jax.stages.report import loss_curve
from lark_jax.stages.student import open_chat, open_student

Weighting = Callable[[Sequence[float]], Sequence[float]]  # of the trajectories of one problem, by rank

WEIGHTINGS: dict[str, Weighting] = {
    "lark": lambda weights: weights,
    "uniform": lambda weights: [sum(weights) / len(weights)] * len(weights),
    "reversed": lambda weights: weights[::-1],
}


def reweighted(examples: Sequence[Example], weighting: Weighting) -> list[Example]:
    """Keeps the total weight of each problem, whose `examples` are adjacent and ordered by rank."""
    result: list[Example] = []
    for _, group in itertools.groupby(examples, key=lambda example: example.rendered.problem_id):
        members = list(group)
        weights = weighting([member.weight for member in members])
        result += [dataclasses.replace(member, weight=w) for member, w in zip(members, weights, strict=True)]
    return result


def write_first_problems(pool: Path, out: Path, count: int) -> None:
    """Copies the records of the first `count` problems unchanged."""
    problems: set[str] = set()
    kept = []
    with pool.open(encoding="utf-8") as lines:
        for line in lines:
            problem = str(json.loads(line)["problem_id"])
            if problem in problems or len(problems) < count:
                problems.add(problem)
                kept.append(line if line.endswith("\n") else line + "\n")
    files.write_text(out, "".join(kept))


def experiment_of(options: argparse.Namespace) -> Experiment:
    return experiment_from_mapping(
        {
            "workdir": str(options.out),
            "seed": options.seed,
            "stages": ("score", "select"),
            "student": {
                "path": str(options.student),
                "chat_template": options.chat_template,
                "max_length": options.max_length,
            },
            "pool": {"path": str(options.out / "pool.jsonl")},
            "score": {"dtype": "float32", "tokens_per_batch": 4_096},
            "select": {"methods": ("lark",), "budgets": (options.budget,)},
            "finetune": {
                "learning_rate": options.learning_rate,
                "epochs": options.epochs,
                "batch_size": 16,
                "dtype": "float32",
                "tokens_per_batch": 2_048,
                "held_out_fraction": options.held_out_fraction,
                "evaluate_every": options.evaluate_every,
            },
        }
    )


def trained(experiment: Experiment, name: str, weighting: Weighting) -> FinetuneResult:
    layout = Layout.of(experiment)
    chat = open_chat(experiment)
    data = training_data(experiment, layout, chat, layout.runs[0])
    mesh = make_mesh(experiment.mesh)
    return finetune(
        open_student(experiment, mesh, "float32"),
        reweighted(data.examples, weighting),
        experiment.finetune,
        seed=experiment.seed,
        mesh=mesh,
        pad_id=chat.pad_id,
        directory=Path(experiment.workdir) / "weightings" / name,
        held_out=data.held_out,
        what=name,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True, help="JSONL file of pool records")
    parser.add_argument("--student", type=Path, required=True, help="checkpoint folder with tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder to work in; the same command continues there")
    parser.add_argument("--chat_template", default=None, help="Jinja file, for tokenizers without a template")
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--budget", type=int, default=3)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--held_out_fraction", type=float, default=0.2)
    parser.add_argument("--evaluate_every", type=int, default=8)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()

    write_first_problems(options.pool, options.out / "pool.jsonl", options.problems)
    experiment = experiment_of(options)
    run_tasks(plan_tasks(experiment))
    results = {name: trained(experiment, name, weighting) for name, weighting in WEIGHTINGS.items()}
    curves = tuple(loss_curve(name, options.budget, result.directory) for name, result in results.items())
    title = f"Weights matter: {options.problems} problems of {options.pool.name}"
    page = write_report(ReportContent(title=title, curves=curves), options.out / "report")
    print(text_table(loss_table(curves)))
    for record in zip(*(read_held_out(result.held_out) for result in results.values()), strict=True):
        print(f"step {record[0].step:>4}  held-out loss  " + "  ".join(f"{measured.loss:.6f}" for measured in record))
    print(f"Report: {page}")
    losses = [[measured.loss for measured in read_held_out(result.held_out)] for result in results.values()]
    distinct = len({measured[-1] for measured in losses}) == len(losses)
    sys.exit(0 if distinct and all(measured[-1] < measured[0] for measured in losses) else 1)


if __name__ == "__main__":
    main()
