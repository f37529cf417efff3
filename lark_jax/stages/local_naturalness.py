"""The metric "local_naturalness": every step under the student, after the prompt and a few steps before it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lark_jax.config import Experiment
from lark_jax.pool import Pool
from lark_jax.runtime import processes, terminal
from lark_jax.runtime.sharding import DATA
from lark_jax.scoring.local_naturalness import (
    NaturalnessOptions,
    Work,
    assemble_local_naturalness,
    plan_work,
    score_local_naturalness,
)
from lark_jax.scoring.local_naturalness.cost import windows_over_one_pass
from lark_jax.scoring.local_naturalness.steps import SENTENCES
from lark_jax.scoring.metric_columns import MetricColumns
from lark_jax.stages.layout import Layout
from lark_jax.stages.metric_task import Metric, MetricResult
from lark_jax.stages.score import PARTS, assembled_when_seen, choose_place, open_scoring_student, require_one_plan
from lark_jax.stages.student import open_chat, student_inputs
from lark_jax.students import local_folder, read_architecture

NAME = "local_naturalness"
TOKENS_OF_STEPS = 2  # increased when the same rule assigns tokens to other steps
NOT_FINITE = "not_finite: a log-likelihood under the student is not finite"


def _inputs(experiment: Experiment, layout: Layout) -> Mapping[str, Any]:
    score = experiment.score
    return {
        **student_inputs(experiment, layout),
        "dtype": score.dtype,
        "context": score.natural_context,
        "tokens": TOKENS_OF_STEPS,
        "split": SENTENCES if score.natural_split is None else score.natural_split,
    }


def _compute(experiment: Experiment, layout: Layout, pool: Pool, directory: Path) -> MetricResult | None:
    del layout
    architecture = read_architecture(local_folder(experiment.student.path))
    place = choose_place(experiment, architecture)
    options = NaturalnessOptions(
        max_length=experiment.student.max_length,
        tokens_per_batch=experiment.score.tokens_per_batch,
        vocab_chunk=experiment.score.vocab_chunk,
        context=experiment.score.natural_context,
        split=experiment.score.natural_split,
    )
    data_shards = place.mesh.shape[DATA]
    work = plan_work(pool, open_chat(experiment), options, data_shards=data_shards, directory=directory / PARTS)
    require_one_plan(work.plan)
    times = windows_over_one_pass(architecture, work)
    terminal.say(f"local naturalness: {work}; {times:.2f} times the FLOPs of one pass per trajectory")
    student = open_scoring_student(experiment, place)
    throughput = score_local_naturalness(student, work, mesh=place.mesh, share=place.share, writes=place.writes)
    terminal.say(f"local naturalness: scored {throughput}")
    processes.barrier("local naturalness: all parts are written")
    if not processes.is_first():
        return None
    scores = assembled_when_seen(lambda: assemble_local_naturalness(work))
    return _result(work, scores, {**work.notes(), "flops_over_one_pass": round(times, 3)})


def _result(work: Work, scores: tuple[float, ...], notes: Mapping[str, Any]) -> MetricResult:
    candidates = tuple(work.pool.ids())
    reasons = {
        candidate: size if isinstance(size, str) else NOT_FINITE
        for candidate, size, score in zip(candidates, work.sizes, scores, strict=True)
        if np.isnan(score)
    }
    columns = MetricColumns(candidates, {NAME: np.asarray(scores, np.float64)})
    return MetricResult(columns, reasons, {"steps": work.num_steps}, notes)


LOCAL_NATURALNESS = Metric((NAME,), _inputs, _compute, scratch=(PARTS,), everywhere=True)
