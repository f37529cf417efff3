"""The scorer against dense float64 statistics of the same student, on 1, 2 and 8 devices."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from lark_jax.config import MeshConfig, SyntheticConfig
from lark_jax.pool import read_pool
from lark_jax.pool.records import Message, Pool
from lark_jax.pool.synthetic import write_synthetic
from lark_jax.rendering.chat import ChatFormat, RenderedTrajectory, load_chat_format, render_trajectory
from lark_jax.runtime.sharding import make_mesh
from lark_jax.scoring import CandidateScore, ScoreOptions, score_pool
from lark_jax.students.architecture import read_architecture
from lark_jax.students.decoder import Decoder

SMALL = SyntheticConfig(num_problems=2, num_test_problems=2, num_pretrain_problems=60, hidden_size=64, num_layers=2)
OPTIONS = ScoreOptions(max_length=128, tokens_per_batch=512, vocab_chunk=100)
NEAR_TIE = 1e-4  # logits: far above what float32 rounds, far below what separates two tokens as a rule


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


def _reference_logits(setting: Setting, items: list[RenderedTrajectory]) -> list[np.ndarray]:
    """Dense logits at the target tokens, float64 [A, V] each; one right-padded batch, so that one shape compiles."""
    tokens = np.zeros((len(items), OPTIONS.max_length), np.int32)
    for row, item in enumerate(items):
        tokens[row, : item.num_inputs] = np.concatenate([item.prompt_tokens, item.target_tokens])[:-1]
    logits = np.asarray(nnx.jit(lambda student, tokens: student.logits(tokens))(setting.student, tokens), np.float64)
    return [logits[row, len(item.prompt_tokens) - 1 : item.num_inputs] for row, item in enumerate(items)]


def test_scores_are_the_means_of_dense_float64_statistics(setting: Setting, tmp_path: Path) -> None:
    scores = _score(setting, tmp_path)
    items = [render_trajectory(setting.chat, t, OPTIONS.max_length) for t in setting.pool.trajectories]
    for score, item, logits in zip(scores, items, _reference_logits(setting, items), strict=True):
        targets = item.target_tokens[:, None]
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        gold = np.take_along_axis(probs, targets, -1)[:, 0]
        residual = probs.copy()
        np.put_along_axis(residual, targets, (gold - 1)[:, None], -1)
        assert score.num_target_tokens == len(item.target_tokens)
        np.testing.assert_allclose(score.statistics["loss"], -np.log(gold).mean(), rtol=1e-5)
        np.testing.assert_allclose(score.statistics["brier"], np.square(residual).sum(-1).mean(), rtol=1e-5)
        np.testing.assert_allclose(score.statistics["target_prob"], gold.mean(), rtol=1e-5)
        np.testing.assert_allclose(
            score.statistics["wrong_concentration"], (np.square(probs).sum(-1) - gold**2).mean(), rtol=1e-4, atol=1e-9
        )


def test_ranks_are_exact_except_near_ties(setting: Setting, tmp_path: Path) -> None:
    scores = _score(setting, tmp_path)
    items = [render_trajectory(setting.chat, t, OPTIONS.max_length) for t in setting.pool.trajectories]
    tokens = near_ties = 0
    for score, item, logits in zip(scores, items, _reference_logits(setting, items), strict=True):
        gap = logits - np.take_along_axis(logits, item.target_tokens[:, None], -1)
        rank = 1 + (gap > 0).sum(-1)
        near = int((np.abs(gap) < NEAR_TIE).sum()) - len(rank)  # without the gold token itself
        # Each near-tie can move one rank by one; the sum is of integers, of which the float32 mean is rounded.
        for name, expected in (("mean_rank", rank), ("mean_clipped_rank", np.minimum(rank, 100))):
            assert abs(round(score.statistics[name] * len(rank)) - int(expected.sum())) <= near, name
        tokens, near_ties = tokens + len(rank), near_ties + near
    assert near_ties < tokens / 4, "so many near-ties that the comparison proves little"


def test_one_row_per_trajectory_in_pool_order(setting: Setting, tmp_path: Path) -> None:
    scores = _score(setting, tmp_path)
    assert [(s.problem_id, s.candidate_id, s.teacher) for s in scores] == [
        (t.problem_id, t.candidate_id, t.teacher) for t in setting.pool.trajectories
    ]
    assert all(score.status == "ok" for score in scores)


def test_one_device_and_eight_give_the_same_scores(setting: Setting, tmp_path: Path) -> None:
    _assert_same_scores(_score(setting, tmp_path / "one", devices=1), _score(setting, tmp_path / "eight", devices=8))


def test_batches_shapes_and_padding_are_reported(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = setting.pool.trajectories[:2]
    _score(setting, tmp_path, devices=1, pool=Pool((first, second)))
    lengths = [render_trajectory(setting.chat, t, OPTIONS.max_length).num_inputs for t in (first, second)]
    length = -(-max(lengths) // 32) * 32
    padding = 1 - sum(lengths) / (OPTIONS.tokens_per_batch // length * length)
    said = capsys.readouterr().err
    assert f"2 trajectories, {sum(lengths)} tokens; 1 batches of 1 shapes in 1 parts, {padding:.2%} padding" in said
    assert f"scored 2 trajectories, {sum(lengths)} tokens, {padding:.2%} padding, 1 shapes;" in said


def _assert_same_scores(found: tuple[CandidateScore, ...], expected: tuple[CandidateScore, ...]) -> None:
    assert [score.name for score in found] == [score.name for score in expected]
    np.testing.assert_allclose(
        [s.statistics["loss"] for s in found], [s.statistics["loss"] for s in expected], rtol=1e-5
    )
    np.testing.assert_allclose(
        [s.statistics["brier"] for s in found], [s.statistics["brier"] for s in expected], rtol=1e-5
    )


def test_what_cannot_be_rendered_is_skipped_with_its_reason_and_the_rest_is_scored(
    setting: Setting, tmp_path: Path
) -> None:
    first, second, *rest = setting.pool.trajectories
    hostile = dataclasses.replace(first, messages=(*first.prompt, Message("assistant", "an <|im_end|> inside")))
    scores = _score(setting, tmp_path, pool=Pool((hostile, second, *rest[:6])))
    assert scores[0].status == "skipped"
    assert "control_token" in scores[0].reason
    assert math.isnan(scores[0].statistics["loss"])
    assert all(score.status == "ok" for score in scores[1:])


def test_truncation_is_flagged_and_an_overlong_prompt_is_skipped(setting: Setting, tmp_path: Path) -> None:
    longest = max(len(render_trajectory(setting.chat, t, 10_000).prompt_tokens) for t in setting.pool.trajectories)
    scores = _score(setting, tmp_path, options=dataclasses.replace(OPTIONS, max_length=longest))
    assert {score.status for score in scores} == {"ok", "skipped"}
    for trajectory, score in zip(setting.pool.trajectories, scores, strict=True):
        whole = render_trajectory(setting.chat, trajectory, 10_000)
        prompt, target = len(whole.prompt_tokens), len(whole.target_tokens)
        if prompt >= longest:
            assert score.status == "skipped"
        else:
            assert score.truncated == (prompt + target > longest)
            assert score.num_target_tokens == min(target, longest - prompt)


def test_a_student_with_nan_weights_yields_skipped_candidates_not_scores(setting: Setting, tmp_path: Path) -> None:
    graph, state = nnx.split(setting.student)
    poisoned = nnx.merge(graph, jax.tree.map(lambda weight: weight * np.float32("nan"), state))
    scores = _score(dataclasses.replace(setting, student=poisoned), tmp_path)
    assert {(score.status, score.reason) for score in scores} == {("skipped", "non-finite loss")}
