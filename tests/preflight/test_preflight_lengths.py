"""Lengths of a pool: given, counted or assumed; the steps hold every row."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.config import Experiment, PoolConfig, StudentConfig
from lark_jax.errors import ConfigError
from lark_jax.preflight.lengths import ASSUMED_MEAN, ASSUMED_TRAJECTORIES, Lengths, find_lengths, plan_steps


def experiment(
    student: str = "nowhere/student", pool: str = "nowhere/pool.jsonl", max_length: int = 32_768
) -> Experiment:
    return Experiment(
        workdir="runs/x",
        stages=("score",),
        student=StudentConfig(path=student, max_length=max_length),
        pool=PoolConfig(path=pool),
    )


def test_given_lengths_are_taken_and_cut_at_the_maximum() -> None:
    lengths = find_lengths(experiment(max_length=4_096), "1000:3,8192:2")
    assert sorted(lengths.inputs) == [1_000] * 3 + [4_095] * 2
    assert lengths.tokens == 11_190


@pytest.mark.parametrize("text", ["", "8192", "8192:", "8192:0", "0:5", "a:b", "8192:1;512:2", "8192:1,"])
def test_malformed_lengths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--lengths="):
        find_lengths(experiment(), text)


def test_without_a_pool_the_papers_is_assumed_and_said() -> None:
    lengths = find_lengths(experiment(), None)
    assert len(lengths.inputs) == ASSUMED_TRAJECTORIES
    assert lengths.tokens / len(lengths.inputs) == pytest.approx(ASSUMED_MEAN, rel=0.05)
    assert max(lengths.inputs) == 32_767
    assert "assumed, since nowhere/pool.jsonl is not here" in lengths.source


def test_without_a_tokenizer_the_pool_cannot_be_counted_and_that_is_said(tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    pool.write_text(json.dumps({"problem_id": "1", "candidate_id": "1", "teacher": "t", "messages": messages}))
    assert "no tokenizer in nowhere/student" in find_lengths(experiment(pool=str(pool)), None).source


def test_a_pool_is_tokenized_with_the_students_tokenizer(shared_data: Path, tmp_path: Path) -> None:
    pools = sorted((shared_data / "pool").glob("*.jsonl"))
    tokenizers = [path.parent for path in sorted((shared_data / "tokenizers").glob("*/tokenizer_config.json"))]
    if not pools or not tokenizers:
        pytest.skip("no pool or tokenizer among the real data")
    small = tmp_path / "pool.jsonl"
    small.write_text("\n".join(pools[0].read_text(encoding="utf-8").splitlines()[:20]), encoding="utf-8")
    lengths = find_lengths(experiment(student=str(tokenizers[0]), pool=str(small)), None)
    assert len(lengths.inputs) <= 20
    assert min(lengths.inputs) > 1
    assert "tokenized" in lengths.source


@given(st.lists(st.integers(1, 32_767), min_size=1, max_size=200), st.integers(1, 16))
def test_steps_hold_every_row_within_the_budget(inputs: list[int], devices: int) -> None:
    lengths = Lengths(tuple(inputs), "drawn")
    steps = plan_steps(lengths, 32_768, devices)
    assert sum(step.rows * step.times for step in steps) * devices >= len(inputs)
    assert sum(step.rows * step.length * step.times for step in steps) * devices >= lengths.tokens
    assert all(step.rows * step.length <= 32_768 for step in steps)
    assert steps[0].length >= max(inputs)
    assert [step.length for step in steps] == sorted((step.length for step in steps), reverse=True)
