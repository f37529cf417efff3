"""A small random student and a weighted selection of a synthetic pool, as input of other trainers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lark_jax.config import SyntheticConfig
from lark_jax.pool import read_pool
from lark_jax.pool.synthetic import write_synthetic
from lark_jax.rendering.chat import load_chat_format, render_trajectories
from lark_jax.selection import (
    Choice,
    Selection,
    SelectionCounts,
    read_training_set,
    resampled_counts,
    write_selection,
)
from lark_jax.students import random_student, read_architecture, save_new_student

PROBLEMS, BUDGET = 4, 2
COPIES = 3


@dataclass(frozen=True)
class Material:
    student: Path
    selection: Path
    max_length: int  # tokens; cuts the longest trajectories

    def arguments(self, rows: int, accumulate: int, out: Path) -> list[str]:
        """Arguments of the TRL recipe."""
        paths = [f"--selection={self.selection}", f"--student={self.student}", f"--out={out}"]
        return [*paths, f"--rows={rows}", f"--accumulate={accumulate}", f"--max_length={self.max_length}"]


def make_material(folder: Path) -> Material:
    sizes = SyntheticConfig(num_problems=PROBLEMS, num_test_problems=1, rollouts=1, num_pretrain_problems=60)
    write_synthetic(sizes, int(np.random.default_rng().integers(1 << 30)), folder / "data")
    blank, student = folder / "data" / "student", folder / "student"
    save_new_student(random_student(read_architecture(blank), 0, "float32"), blank, student)
    _write_weighted(folder / "data" / "pool.jsonl", folder / "lark_B2")
    trajectories = [item.trajectory for item in read_training_set(folder / "lark_B2")]
    lengths = sorted(
        item.num_inputs + 1 for item in render_trajectories(load_chat_format(student), trajectories, 10_000)
    )
    return Material(student, folder / "lark_B2", max_length=lengths[-2] - 1)


def _write_weighted(pool_file: Path, directory: Path) -> None:
    pool, rng = read_pool(pool_file, "error"), np.random.default_rng()
    choices = tuple(
        Choice(item.problem_id, item.candidate_id, item.teacher, float(weight), 0.5, rank)
        for group in pool.by_problem().values()
        for rank, (item, weight) in enumerate(zip(group, rng.dirichlet(np.ones(BUDGET)), strict=False), start=1)
    )
    counts = SelectionCounts(PROBLEMS, len(pool.trajectories), 0, (), (), 0, len(choices), 0)
    write_selection(Selection("lark", BUDGET, choices, counts), pool, directory, resampled_counts(choices, COPIES, 0))
