"""Stage "score": one forward pass per trajectory, `score/scores.parquet`."""

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from lark_jax.config import Experiment
from lark_jax.errors import PoolError
from lark_jax.pipeline import Outcome, Task
from lark_jax.pool import Pool, read_pool
from lark_jax.scoring import CandidateScore, ScoreOptions, score_pool, write_scores
from lark_jax.sharding import make_mesh
from lark_jax.stages.layout import Layout
from lark_jax.stages.student import notes_on, open_chat, open_student, student_inputs

SCORES = "scores.parquet"


def score_tasks(experiment: Experiment, layout: Layout) -> list[Task]:
    def inputs() -> dict[str, Any]:
        return {
            "pool": layout.hashes.of(experiment.pool.path, PoolError),
            "on_bad_record": experiment.pool.on_bad_record,
            **student_inputs(experiment, layout),
            "dtype": experiment.score.dtype,
            "metrics": experiment.score.metrics,
        }

    def run(directory: Path) -> Outcome:
        pool = read_pool(experiment.pool.path, experiment.pool.on_bad_record)
        chat = open_chat(experiment)
        mesh = make_mesh(experiment.mesh)
        student = open_student(experiment, mesh, experiment.score.dtype)
        options = ScoreOptions(
            max_length=experiment.student.max_length,
            tokens_per_batch=experiment.score.tokens_per_batch,
            vocab_chunk=experiment.score.vocab_chunk,
        )
        parts = directory / "parts"
        scores = score_pool(student, pool, chat, mesh=mesh, options=options, parts_directory=parts)
        refuse_if_nothing_scored(scores)
        write_scores(directory / SCORES, scores)
        shutil.rmtree(parts, ignore_errors=True)
        return dataclasses.replace(outcome_of(pool, scores), notes=notes_on(chat))

    return [Task("score", layout.score, inputs, run)]


def refuse_if_nothing_scored(scores: tuple[CandidateScore, ...]) -> None:
    """Raises PoolError when every trajectory was skipped: going on would train on nothing."""
    skipped = [score for score in scores if score.status != "ok"]
    if len(skipped) == len(scores):
        kinds = Counter(score.reason.partition(":")[0] for score in skipped)
        listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        raise PoolError(f"none of {len(scores)} trajectories could be scored: {listed}; first: {skipped[0].reason}")


def outcome_of(pool: Pool, scores: tuple[CandidateScore, ...]) -> Outcome:
    locations = {(t.problem_id, t.candidate_id): t.location for t in pool.trajectories}
    unread = [dataclasses.asdict(record) for record in pool.skipped]
    unscored = [
        {
            "problem_id": score.problem_id,
            "candidate_id": score.candidate_id,
            "location": locations[score.problem_id, score.candidate_id],
            "reason": score.reason,
        }
        for score in scores
        if score.status != "ok"
    ]
    counts = {
        "trajectories": len(scores),
        "scored": len(scores) - len(unscored),
        "truncated": sum(score.truncated for score in scores),
        "target tokens": sum(score.num_target_tokens for score in scores if score.status == "ok"),
    }
    return Outcome(counts=counts, skipped=unread + unscored)
