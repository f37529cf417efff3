"""Lengths of a pool: given, counted or assumed; the steps hold every row."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.config import Experiment, PoolConfig, StudentConfig, SyntheticConfig
from lark_jax.errors import ConfigError
from lark_jax.pool import read_pool
from lark_jax.pool.synthetic import write_synthetic
from lark_jax.preflight.lengths import ASSUMED_MEAN, ASSUMED_TRAJECTORIES, Lengths, find_lengths, plan_steps
from lark_jax.rendering.chat import load_chat_format, render_trajectory


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


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pool.jsonl and student/, whose tokenizer has its template in tokenizer_config.json."""
    folder = tmp_path_factory.mktemp("material")
    sizes = SyntheticConfig(num_problems=6, num_test_problems=2, num_pretrain_problems=60, rollouts=2)
    write_synthetic(sizes, int(np.random.default_rng().integers(1000)), folder)
    return folder


def own_experiment(material: Path, workdir: Path) -> Experiment:
    plain = experiment(student=str(material / "student"), pool=str(material / "pool.jsonl"), max_length=256)
    return dataclasses.replace(plain, workdir=str(workdir))


def test_a_pool_is_tokenized_with_the_students_tokenizer(material: Path, tmp_path: Path) -> None:
    lengths = find_lengths(own_experiment(material, tmp_path), None)
    pool, chat = read_pool(material / "pool.jsonl"), load_chat_format(material / "student")
    rendered = [render_trajectory(chat, trajectory, 256) for trajectory in pool.trajectories]
    assert lengths.inputs == tuple(len(row.prompt_tokens) + len(row.target_tokens) - 1 for row in rendered)
    assert "tokenized" in lengths.source


def test_a_pool_is_counted_once(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    shutil.copy(material / "pool.jsonl", folder)
    own = dataclasses.replace(own_experiment(material, tmp_path), pool=PoolConfig(path=str(folder)))
    first = find_lengths(own, None)
    (folder / "README.md").write_text("no part of the pool")
    assert first.longest > 99
    with monkeypatch.context() as patched:
        patched.setattr("lark_jax.rendering.token_counts.render_trajectories", lambda *_: pytest.fail("counted again"))
        assert find_lengths(own, None) == first
    shorter = dataclasses.replace(own, student=dataclasses.replace(own.student, max_length=100))
    assert find_lengths(shorter, None).longest == 99  # not what was kept for longer rows


def test_tokenizer_json_and_a_template_are_enough(material: Path, tmp_path: Path) -> None:
    """Without tokenizer_config.json, as scoring reads the student too."""
    student = tmp_path / "student"
    student.mkdir()
    shutil.copy(material / "student" / "tokenizer.json", student)
    template = tmp_path / "template.jinja"
    template.write_text(load_chat_format(material / "student").template, encoding="utf-8")
    own = own_experiment(material, tmp_path / "run")
    bare = dataclasses.replace(
        own, student=dataclasses.replace(own.student, path=str(student), chat_template=str(template))
    )
    lengths = find_lengths(bare, None)
    assert lengths.inputs == find_lengths(own, None).inputs


@given(st.lists(st.integers(1, 32_767), min_size=1, max_size=200), st.integers(1, 16))
def test_steps_hold_every_row_within_the_budget(inputs: list[int], devices: int) -> None:
    lengths = Lengths(tuple(inputs), "drawn")
    steps = plan_steps(lengths, 32_768, devices)
    assert sum(step.rows * step.times for step in steps) * devices >= len(inputs)
    assert sum(step.rows * step.length * step.times for step in steps) * devices >= lengths.tokens
    assert all(step.rows * step.length <= 32_768 for step in steps)
    assert steps[0].length >= max(inputs)
    assert [step.length for step in steps] == sorted((step.length for step in steps), reverse=True)
