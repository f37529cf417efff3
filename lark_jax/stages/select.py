"""Stage "select": writes `selection/<method>_B<budget>/` from the score table; needs no accelerator."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lark_jax.config import Experiment
from lark_jax.pool import Pool, SkippedRecord
from lark_jax.runtime.pipeline import MANIFEST, Manifest, Outcome, Task, require_manifest
from lark_jax.scoring import read_score_table
from lark_jax.selection import Method, Selection, resampled_counts, select_trajectories, write_selection
from lark_jax.stages.layout import Layout, Run
from lark_jax.stages.pool import open_pool, pool_inputs
from lark_jax.stages.score_table import SCORES, VERSIONS
from lark_jax.stages.student import SCORED_WITH, UNRECORDED


def select_tasks(experiment: Experiment, layout: Layout) -> list[Task]:
    pool = functools.cache(lambda: open_pool(experiment))  # read once, when the first method needs it
    return [_select_task(experiment, layout, run, pool) for run in layout.runs]


def _select_task(experiment: Experiment, layout: Layout, run: Run, pool: Callable[[], Pool]) -> Task:
    def inputs() -> dict[str, Any]:
        scored = provenance(require_manifest(layout.score, "score"))
        rendering = scored.pop("rendering_version") or UNRECORDED["rendering"]
        return {
            "scored": scored,
            "rendering": rendering,
            "scores": layout.hashes.of(layout.score / SCORES),
            **pool_inputs(experiment, layout),
            "method": run.method.name,
            "parameters": run.method.parameters(),
            "budget": run.budget,
            "seed": experiment.seed,
            "resample": experiment.select.resample,
        }

    def select(directory: Path) -> Outcome:
        table = read_score_table(layout.score / SCORES)
        selection = select_trajectories(table, run.method, run.budget, experiment.seed)
        copies = experiment.select.resample
        counts = resampled_counts(selection.choices, copies, experiment.seed) if copies else None
        write_selection(selection, pool(), directory, counts)
        scored = provenance(require_manifest(layout.score, "score"))
        return dataclasses.replace(outcome_of(selection, run.method), notes={"scored": scored})

    return Task(f"select/{run.name}", layout.selection(run), inputs, select, unrecorded=UNRECORDED)


def provenance(score: Manifest) -> dict[str, Any]:
    """Notes on the forward pass for a selection's own manifest, since its folder may go elsewhere; null if unknown."""
    notes = score.outcome.notes
    return {**{name: notes.get(name) for name in SCORED_WITH}, "versions": notes.get(VERSIONS, score.versions)}


def outcome_of(selection: Selection, method: Method) -> Outcome:
    """Counts, and each problem without a choice with the reason."""
    counts = selection.counts
    values = dataclasses.asdict(counts)
    numbers = {name.replace("_", " "): value for name, value in values.items() if isinstance(value, int)}
    source = SCORES if method.score.metric is None else f"metrics/{method.score.metric}/{MANIFEST}"
    reasons = {
        **dict.fromkeys(counts.problems_without_valid_candidate, "no candidate of this problem could be scored"),
        **dict.fromkeys(
            counts.problems_without_value,
            f"no scored candidate of this problem has a value of method {method.name!r}; see {source}",
        ),
    }
    skipped = [
        dataclasses.asdict(SkippedRecord(problem_id, "", SCORES, reason)) for problem_id, reason in reasons.items()
    ]
    return Outcome(counts={**numbers, "problems without candidate": len(skipped)}, skipped=skipped)
