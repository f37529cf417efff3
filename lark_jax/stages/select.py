"""Stage "select": `selection/<method>_B<budget>/`, from the score table alone; needs no accelerator."""

import dataclasses
from pathlib import Path
from typing import Any

from lark_jax.config import Experiment
from lark_jax.pipeline import Manifest, Outcome, Task, require_manifest
from lark_jax.pool import read_pool
from lark_jax.scoring import read_scores
from lark_jax.selection import Selection, resampled_counts, select_trajectories, write_selection
from lark_jax.stages.layout import Layout, Run
from lark_jax.stages.score import SCORES


def select_tasks(experiment: Experiment, layout: Layout) -> list[Task]:
    return [_select_task(experiment, layout, run) for run in layout.runs]


def _select_task(experiment: Experiment, layout: Layout, run: Run) -> Task:
    def inputs() -> dict[str, Any]:
        require_manifest(layout.score, "score")
        return {
            "scores": layout.hashes.of(layout.score / SCORES),
            "pool": layout.hashes.of(experiment.pool.path),
            "on_bad_record": experiment.pool.on_bad_record,
            "method": run.method.name,
            "budget": run.budget,
            "seed": experiment.seed,
            "resample": experiment.select.resample,
        }

    def select(directory: Path) -> Outcome:
        pool = read_pool(experiment.pool.path, experiment.pool.on_bad_record)
        selection = select_trajectories(read_scores(layout.score / SCORES), run.method, run.budget, experiment.seed)
        copies = experiment.select.resample
        counts = resampled_counts(selection.choices, copies, experiment.seed) if copies else None
        write_selection(selection, pool, directory, counts)
        scored_by = provenance(require_manifest(layout.score, "score"))
        return dataclasses.replace(outcome_of(selection), notes={"scored_by": scored_by})

    return Task(f"select/{run.name}", layout.selection(run), inputs, select)


def provenance(score: Manifest) -> dict[str, Any]:
    """What made the scores, in the selection's own manifest: its folder may be taken to another trainer.

    With the manifest's other entries (hash of the pool, method, budget, seed, versions) nothing about a selection has
    to be looked up in the working directory that it came from.
    """
    tokens = ("tokenizer_sha256", "chat_template_sha256", "frozen_date")
    return {
        "student_sha256": score.inputs["student"],
        **{name: score.outcome.notes[name] for name in tokens},
        "max_length": score.inputs["max_length"],
        "dtype": score.inputs["dtype"],
        "pool_sha256": score.inputs["pool"],
        "versions": score.versions,
    }


def outcome_of(selection: Selection) -> Outcome:
    counts = selection.counts
    empty = counts.problems_without_valid_candidate
    numbers = {name.replace("_", " "): value for name, value in dataclasses.asdict(counts).items() if value != empty}
    reason = "no candidate of this problem could be scored"
    skipped = [
        {"problem_id": problem_id, "candidate_id": "", "location": SCORES, "reason": reason} for problem_id in empty
    ]
    return Outcome(counts={**numbers, "problems without candidate": len(empty)}, skipped=skipped)
