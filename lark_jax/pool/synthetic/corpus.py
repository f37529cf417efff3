"""Problems and answers as pool records: the pre-training corpus, the pool, and the benchmark."""

import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lark_jax.config import SyntheticConfig
from lark_jax.pool.records import Message, Trajectory
from lark_jax.pool.synthetic import teachers
from lark_jax.pool.synthetic.problems import Problem, generate_problems

INSTRUCTION = "Think step by step and put the final answer in \\boxed{}."
# The base student knows the task in one plain style, has rarely seen two of the teachers, and never the other three.
PRETRAINING_STYLES: Mapping[str, teachers.Style] = MappingProxyType(
    {"plain": teachers.plain, "terse": teachers.terse, "verbose": teachers.verbose}
)
_STYLE_SHARES = (0.8, 0.15, 0.05)


def prompt_text(problem: Problem) -> str:
    """The user's message, the same in pre-training, pool and benchmark."""
    return f"{problem.text} {INSTRUCTION}"


def pretraining_trajectories(seed: int, config: SyntheticConfig) -> tuple[Trajectory, ...]:
    """One answer to each problem of the pretrain split, in a style drawn by `PRETRAINING_STYLES`."""
    trajectories = []
    for problem in generate_problems(seed, config.num_pretrain_problems, "pretrain"):
        rng = random.Random(f"{seed}/{problem.problem_id}/style")
        (style,) = rng.choices(tuple(PRETRAINING_STYLES), weights=_STYLE_SHARES)
        trajectories.append(_trajectory(problem, f"{style}-0", style, PRETRAINING_STYLES[style](problem, rng)))
    return tuple(trajectories)


def pool_trajectories(seed: int, config: SyntheticConfig) -> tuple[Trajectory, ...]:
    """`config.rollouts` answers of every teacher to each problem of the pool split."""
    return tuple(
        _trajectory(problem, f"{teacher}-{rollout}", teacher, answer)
        for problem in generate_problems(seed, config.num_problems, "pool")
        for teacher in teachers.TEACHERS
        for rollout, answer in enumerate(teachers.rollouts(problem, teacher, config.rollouts, seed))
    )


def benchmark_records(seed: int, config: SyntheticConfig) -> list[dict[str, Any]]:
    """The problems of the test split as benchmark records; `problem` is the whole user message."""
    return [
        {
            "problem_id": problem.problem_id,
            "problem": prompt_text(problem),
            "answer": str(problem.answer),
            "level": problem.level,
            "kind": "number",
        }
        for problem in generate_problems(seed, config.num_test_problems, "test")
    ]


def _trajectory(problem: Problem, candidate_id: str, teacher: str, response: str) -> Trajectory:
    return Trajectory(
        problem_id=problem.problem_id,
        candidate_id=candidate_id,
        teacher=teacher,
        messages=(Message("user", prompt_text(problem)), Message("assistant", response)),
        location="synthetic",
        answer=str(problem.answer),
        correct=True,
        meta=MappingProxyType({"level": problem.level}),
    )
