"""Compares all methods on one score table in seconds: overlap, mean length, teachers.

    python scripts/compare_methods.py --scores=runs/mine/score/scores.parquet --out=build/compare_methods

Lists and skips methods whose metric is not in the table. Writes `selections.txt`, `selections.json` and
`selections.png`; the report of a run shows the same for its own methods.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from lark_jax.diagnostics import FinishedSelection
from lark_jax.diagnostics.selections import compare_selections, selection_figure, selection_table
from lark_jax.errors import SelectionError
from lark_jax.report.style import png_bytes
from lark_jax.report.table import text_table
from lark_jax.runtime.files import write_json, write_text
from lark_jax.scoring import ScoreTable, read_score_table
from lark_jax.selection import METHODS, select_trajectories


def select_all(
    table: ScoreTable, methods: Sequence[str], budgets: Sequence[int], seed: int
) -> tuple[list[FinishedSelection], dict[str, str]]:
    """The selections of the methods that can select, and the reasons of the others."""
    selections, refused = [], {}
    for budget in budgets:
        for name in methods:
            try:
                choices = select_trajectories(table, METHODS[name], budget, seed).choices
            except SelectionError as error:
                refused[name] = str(error)
                continue
            weighted = tuple(choice for choice in choices if choice.weight > 0)
            selections.append(FinishedSelection(name, budget, weighted))
    return selections, refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scores", type=Path, required=True, help="score/scores.parquet of a run")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--budgets", default="1,3,5")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    arguments = parser.parse_args()
    start = time.perf_counter()
    table = read_score_table(arguments.scores)
    budgets = [int(budget) for budget in arguments.budgets.split(",")]
    selections, refused = select_all(table, arguments.methods.split(","), budgets, arguments.seed)
    seconds = time.perf_counter() - start
    for name, reason in refused.items():
        print(f"left out: {name}: {reason}")
    if len(selections) < 2:
        raise SystemExit("fewer than two selections: nothing to compare")
    comparison = compare_selections(table, selections)
    text = text_table(selection_table(comparison))
    print(f"{len(selections)} selections from {len(table):,} candidates in {seconds:.1f} s\n\n{text}")
    write_text(arguments.out / "selections.txt", text + "\n")
    write_json(arguments.out / "selections.json", dataclasses.asdict(comparison))
    (arguments.out / "selections.png").write_bytes(png_bytes(selection_figure(comparison)))


if __name__ == "__main__":
    main()
