"""The metric "judge": LLM-judged Quality, one overall score per trajectory (Appendix C.2 of the paper).

`verdicts.jsonl` in the metric's folder has all scores and reasons. The judge's answers are stored elsewhere, in
`judge/answers.jsonl` of the working directory: another rubric empties the metric's folder, and answers cost money.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lark_jax.config import Experiment
from lark_jax.errors import JudgeError
from lark_jax.evaluation.worker.server_client import ServerAccess
from lark_jax.judging.answers import AnswerFile
from lark_jax.judging.judge import Decoding, Engine, JudgedPool, judge_trajectories
from lark_jax.judging.judgement import answer_schema
from lark_jax.judging.offline import OfflineJudge
from lark_jax.judging.rubric import Rubric, read_rubric
from lark_jax.judging.server import ServerJudge
from lark_jax.pool import Pool
from lark_jax.runtime import terminal
from lark_jax.runtime.files import write_jsonl
from lark_jax.scoring.metric_columns import MetricColumns
from lark_jax.stages.layout import Layout
from lark_jax.stages.metric_task import Metric, MetricResult
from lark_jax.stages.student import student_hash

COLUMN = "judge"
VERDICTS = "verdicts.jsonl"
ANSWERS = "answers.jsonl"


def _inputs(experiment: Experiment, layout: Layout) -> Mapping[str, Any]:
    """The judge's address and its rate limits are left out: scores do not depend on them."""
    config = experiment.score.judge
    rubric = read_rubric(config.prompt_file)
    return {
        "judge": _model_hash(experiment, layout) if config.engine == "vllm" else config.model,
        "rubric": [rubric.criteria, rubric.system, rubric.user],
        "decoding": _decoding(experiment, rubric).as_json(),
        "attempts": config.attempts,
    }


def _compute(experiment: Experiment, layout: Layout, pool: Pool, directory: Path) -> MetricResult:
    config = experiment.score.judge
    rubric = read_rubric(config.prompt_file)
    engine = _engine(experiment, layout, rubric)
    with AnswerFile(layout.judge / ANSWERS) as answers:
        terminal.say(f"judge: {config.model} by {config.engine}, {len(answers):,} answers known")
        judged = judge_trajectories(pool.trajectories, rubric, engine, answers, config.attempts)
    _require_some_judgement(judged)
    write_jsonl(directory / VERDICTS, _judgement_rows(pool, judged))
    return _result(pool, judged)


def _engine(experiment: Experiment, layout: Layout, rubric: Rubric) -> Engine:
    config = experiment.score.judge
    decoding = _decoding(experiment, rubric)
    assert config.model is not None  # the configuration is validated
    if config.engine == "openai":
        assert config.server is not None
        access = ServerAccess(
            config.server, config.key_variable, config.timeout, config.retries, config.requests_per_minute
        )
        return ServerJudge(access, config.model, decoding, config.concurrency)
    _require_free_accelerator(experiment)
    return OfflineJudge(
        folder=Path(config.model),
        model_hash=_model_hash(experiment, layout),
        decoding=decoding,
        work=layout.judge,
        python=experiment.evaluate.python,
        tensor_parallel=config.tensor_parallel,
        engines=experiment.evaluate.engines,
    )


def _decoding(experiment: Experiment, rubric: Rubric) -> Decoding:
    config = experiment.score.judge
    return Decoding(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        structured_output=config.structured_output,
        schema=answer_schema(rubric.criteria),
        template_arguments=json.loads(config.template_arguments),
    )


def _model_hash(experiment: Experiment, layout: Layout) -> str:
    return student_hash(layout, Path(str(experiment.score.judge.model)), JudgeError)


def waits_for_the_accelerator(experiment: Experiment) -> bool:
    """Whether this process holds the accelerator that the judge needs: JAX keeps it until the process ends."""
    score = experiment.score
    return "judge" in score.metrics and score.judge.engine == "vllm" and jax.default_backend() != "cpu"


def _require_free_accelerator(experiment: Experiment) -> None:
    """Raises JudgeError, which names the commands that continue, if the judge needs the accelerator that JAX holds."""
    if waits_for_the_accelerator(experiment):
        raise JudgeError(
            'config.score.judge.engine: "vllm" needs the accelerator that this process holds. Everything else in the '
            'stage "score" is finished and kept. Run the same command under JAX_PLATFORMS=cpu with --only=score, which '
            'runs only the judge, then the original command again; or serve the judge and use engine "openai"'
        )


def _require_some_judgement(judged: JudgedPool) -> None:
    if judged.reasons and len(judged.reasons) == len(judged.judgements):
        first = judged.reasons[min(judged.reasons)]
        raise JudgeError(
            f"the judge gave no usable answer for any of {len(judged.judgements):,} trajectories; the first: {first}"
        )


def _judgement_rows(pool: Pool, judged: JudgedPool) -> Iterator[dict[str, Any]]:
    for (problem_id, candidate_id), judgement in zip(pool.ids(), judged.judgements, strict=True):
        if judgement is not None:
            yield {
                "problem_id": problem_id,
                "candidate_id": candidate_id,
                "overall_score": judgement.overall_score,
                "overall_reason": judgement.overall_reason,
                "scores": judgement.scores,
            }


def _result(pool: Pool, judged: JudgedPool) -> MetricResult:
    candidates = tuple(pool.ids())
    scores = [np.nan if judgement is None else judgement.overall_score for judgement in judged.judgements]
    return MetricResult(
        MetricColumns(candidates, {COLUMN: np.array(scores, np.float64)}),
        reasons={candidates[position]: reason for position, reason in judged.reasons.items()},
        counts={
            "questions asked": judged.num_asked,
            "questions known": judged.num_known,
            "answers of no use": judged.num_unusable,
        },
    )


JUDGE = Metric((COLUMN,), _inputs, _compute)
