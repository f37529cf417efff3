"""The scorer against dense float64 statistics of the same student, on one device and on eight, interrupted or not."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from lark_jax.config import MeshConfig, SyntheticConfig
from lark_jax.pool import read_pool
from lark_jax.pool.chat import ChatFormat, load_chat_format, render_trajectory
from lark_jax.pool.records import Message, Pool
from lark_jax.pool.synthetic import write_synthetic
from lark_jax.scoring import ScoreOptions, read_scores, score_pool
from lark_jax.scoring.scorer import split_into_parts
from lark_jax.sharding import make_mesh
from lark_jax.students.architecture import read_architecture
from lark_jax.students.decoder import Decoder

SMALL = SyntheticConfig(num_problems=5, num_test_problems=2, num_pretrain_problems=60, hidden_size=64, num_layers=2)
OPTIONS = ScoreOptions(max_length=200, tokens_per_batch=512, vocab_chunk=100)


@dataclasses.dataclass(frozen=True)
class Setting:
    pool: Pool
    chat: ChatFormat
    student: Decoder


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("synthetic")
    write_synthetic(SMALL, 7, folder)
    student = Decoder(read_architecture(folder / "student"), rngs=nnx.Rngs(0))
    return Setting(read_pool(folder / "pool.jsonl"), load_chat_format(folder / "student"), student)


def _score(setting: Setting, parts: Path, devices: int = 2, pool: Pool | None = None, options: ScoreOptions = OPTIONS):
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    pool = pool or setting.pool
    return score_pool(setting.student, pool, setting.chat, mesh=mesh, options=options, parts_directory=parts)


def test_scores_are_the_means_of_dense_float64_statistics(setting: Setting, tmp_path: Path) -> None:
    scores = _score(setting, tmp_path)
    for trajectory, score in list(zip(setting.pool.trajectories, scores, strict=True))[::7]:
        rendered = render_trajectory(setting.chat, trajectory, OPTIONS.max_length)
        tokens = np.concatenate([rendered.prompt_tokens, rendered.target_tokens])
        logits = np.asarray(setting.student.logits(tokens[None, :-1])[0], np.float64)[len(rendered.prompt_tokens) - 1 :]
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        gold = np.take_along_axis(probs, rendered.target_tokens[:, None], -1)[:, 0]
        rank = 1 + (probs > gold[:, None]).sum(-1)
        residual = probs.copy()
        np.put_along_axis(residual, rendered.target_tokens[:, None], (gold - 1)[:, None], -1)
        assert score.num_target_tokens == len(rendered.target_tokens)
        np.testing.assert_allclose(score.loss, -np.log(gold).mean(), rtol=1e-5)
        np.testing.assert_allclose(score.brier, np.square(residual).sum(-1).mean(), rtol=1e-5)
        np.testing.assert_allclose(score.target_prob, gold.mean(), rtol=1e-5)
        np.testing.assert_allclose(
            score.wrong_concentration, (np.square(probs).sum(-1) - gold**2).mean(), rtol=1e-4, atol=1e-9
        )
        np.testing.assert_allclose(score.mean_clipped_rank, np.minimum(rank, 100).mean(), rtol=2e-2)


def test_one_row_per_trajectory_in_pool_order(setting: Setting, tmp_path: Path) -> None:
    scores = _score(setting, tmp_path)
    assert [(s.problem_id, s.candidate_id, s.teacher) for s in scores] == [
        (t.problem_id, t.candidate_id, t.teacher) for t in setting.pool.trajectories
    ]
    assert all(score.status == "ok" for score in scores)


def test_one_device_and_eight_give_the_same_scores(setting: Setting, tmp_path: Path) -> None:
    one, eight = _score(setting, tmp_path / "one", devices=1), _score(setting, tmp_path / "eight", devices=8)
    np.testing.assert_allclose([s.loss for s in one], [s.loss for s in eight], rtol=1e-5)
    np.testing.assert_allclose([s.brier for s in one], [s.brier for s in eight], rtol=1e-5)


def test_a_restart_takes_over_finished_parts_and_computes_only_the_rest(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lark_jax.scoring.scorer.split_into_parts", lambda plans: split_into_parts(plans, 1))
    undisturbed = _score(setting, tmp_path)
    parts = sorted(tmp_path.glob("part-*.parquet"))
    assert len(parts) > 2
    before = parts[1].read_bytes()
    tampered = [dataclasses.replace(score, loss=123.0) for score in read_scores(parts[0])]
    monkeypatch.undo()
    monkeypatch.setattr("lark_jax.scoring.scorer.split_into_parts", lambda plans: split_into_parts(plans, 1))
    from lark_jax.scoring import write_scores

    write_scores(parts[0], tampered)
    parts[1].unlink()
    resumed = _score(setting, tmp_path)
    assert parts[1].read_bytes() == before
    changed = [new for new, old in zip(resumed, undisturbed, strict=True) if new != old]
    assert {score.loss for score in changed} == {123.0}
    assert len(changed) == len(tampered)


def test_what_cannot_be_rendered_is_skipped_with_its_reason_and_the_rest_is_scored(
    setting: Setting, tmp_path: Path
) -> None:
    first, second, *rest = setting.pool.trajectories
    hostile = dataclasses.replace(first, messages=(*first.prompt, Message("assistant", "an <|im_end|> inside")))
    scores = _score(setting, tmp_path, pool=Pool((hostile, second, *rest[:6])))
    assert scores[0].status == "skipped"
    assert "control_token" in scores[0].reason
    assert math.isnan(scores[0].loss)
    assert all(score.status == "ok" for score in scores[1:])


def test_truncation_is_flagged_and_an_overlong_prompt_is_skipped(setting: Setting, tmp_path: Path) -> None:
    short = dataclasses.replace(OPTIONS, max_length=70)
    scores = _score(setting, tmp_path, options=short)
    for trajectory, score in zip(setting.pool.trajectories, scores, strict=True):
        whole = render_trajectory(setting.chat, trajectory, 10_000)
        prompt, target = len(whole.prompt_tokens), len(whole.target_tokens)
        if prompt >= 70:
            assert score.status == "skipped"
        else:
            assert score.truncated == (prompt + target > 70)
            assert score.num_target_tokens == min(target, 70 - prompt)


def test_a_student_with_nan_weights_yields_skipped_candidates_not_scores(setting: Setting, tmp_path: Path) -> None:
    graph, state = nnx.split(setting.student)
    poisoned = nnx.merge(graph, jax.tree.map(lambda weight: weight * np.float32("nan"), state))
    scores = _score(dataclasses.replace(setting, student=poisoned), tmp_path)
    assert {(score.status, score.reason) for score in scores} == {("skipped", "non-finite loss")}
