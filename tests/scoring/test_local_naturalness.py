"""Local Naturalness against its definition: every step in a row of its own, through transformers, in float32."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lark_jax.config import MeshConfig, SyntheticConfig
from lark_jax.pool import read_pool
from lark_jax.pool.records import Message, Pool, Trajectory
from lark_jax.pool.synthetic import write_synthetic
from lark_jax.rendering.chat import ChatFormat, load_chat_format, render_trajectory
from lark_jax.runtime.files import write_json
from lark_jax.runtime.sharding import DATA, TENSOR, make_mesh
from lark_jax.scoring.local_naturalness import (
    NaturalnessOptions,
    Work,
    assemble_local_naturalness,
    plan_work,
    score_local_naturalness,
    scorer,
)
from lark_jax.scoring.local_naturalness.cost import load_of_batch, load_of_part
from lark_jax.scoring.local_naturalness.windows import WindowBatch
from lark_jax.scoring.local_naturalness.work import render_part
from lark_jax.scoring.pool_pass import BATCHES_IN_FLIGHT
from lark_jax.scoring.throughput import NO_LOAD
from lark_jax.students import Decoder, load_student, random_student, read_architecture, save_new_student

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

SIZES = SyntheticConfig(num_problems=3, num_test_problems=2, num_pretrain_problems=60, rollouts=1)
OPTIONS = NaturalnessOptions(max_length=400, tokens_per_batch=4_096, vocab_chunk=200, context=2)
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
UNRENDERABLE = 4  # index into the pool


@dataclasses.dataclass(frozen=True)
class Setting:
    pool: Pool
    chat: ChatFormat
    folder: Path
    student: Decoder


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("naturalness")
    write_synthetic(SIZES, int(np.random.default_rng().integers(1_000)), folder)
    write_json(folder / "blank" / "config.json", CONFIG)
    architecture = read_architecture(folder / "blank")
    student = random_student(architecture, int(np.random.default_rng().integers(1_000)), "float32")
    # Large enough that attention is far from uniform: what a token sees matters.
    student.embed_tokens.weight[...] *= 15.0
    for projection in (student.layers.self_attn.q_proj, student.layers.self_attn.v_proj, student.layers.mlp.up_proj):
        projection.weight[...] *= 10.0
    save_new_student(student, folder / "blank", folder / "wide")
    student, _ = load_student(folder / "wide", dtype="float32")
    return Setting(_pool(folder), load_chat_format(folder / "student"), folder / "wide", student)


def _pool(folder: Path) -> Pool:
    """Answers of 1 to 25 steps; some are cut by `max_length`, one cannot be rendered."""
    rng = np.random.default_rng()
    trajectories = list(read_pool(folder / "pool.jsonl").trajectories)
    sentences = [t.response.replace("\n", " ") for t in trajectories]
    for index, trajectory in enumerate(trajectories):
        some = rng.choice(sentences, size=int(rng.integers(0, 6)))
        response = rng.choice([" ", "\n", "\n\n"]).join([*some, trajectory.response])
        trajectories[index] = _answering(trajectory, response + rng.choice(["", "\n"]))
    trajectories[UNRENDERABLE] = _answering(trajectories[UNRENDERABLE], "an <|im_end|> inside")
    trajectories[UNRENDERABLE + 1] = _answering(trajectories[UNRENDERABLE + 1], "so 3 of them are 5, " * 60)
    return Pool(tuple(trajectories))


def _answering(trajectory: Trajectory, response: str) -> Trajectory:
    return dataclasses.replace(trajectory, messages=(*trajectory.prompt, Message("assistant", response)))


def _scores(
    setting: Setting, folder: Path, options: NaturalnessOptions = OPTIONS, data: int = 1, tensor: int = 1
) -> tuple[np.ndarray, Work]:
    mesh = make_mesh(MeshConfig(data, tensor), jax.devices()[: data * tensor])
    work = plan_work(setting.pool, setting.chat, options, data_shards=data, directory=folder)
    score_local_naturalness(setting.student, work, mesh=mesh)
    return np.array(assemble_local_naturalness(work)), work


def _by_definition(setting: Setting, steps_of: list[np.ndarray | str], options: NaturalnessOptions) -> np.ndarray:
    """Every step in a row of its own: prompt, at most `context` steps, the step; nothing is shared or batched."""
    model = transformers.AutoModelForCausalLM.from_pretrained(setting.folder, dtype=torch.float32).eval()
    scores = np.full(len(steps_of), np.nan)
    for index, steps in enumerate(steps_of):
        if isinstance(steps, str):
            continue
        item = render_trajectory(setting.chat, setting.pool.trajectories[index], options.max_length)
        ends = np.cumsum(steps)
        of_steps = []
        for step, size in enumerate(steps):
            start = 0 if step <= options.context else ends[step - options.context - 1]
            row = np.concatenate([item.prompt_tokens, item.target_tokens[start : ends[step]]]).astype(np.int64)
            with torch.inference_mode():
                logits = model(torch.from_numpy(row[None])).logits[0].double().log_softmax(-1)
            predicted = logits[-size - 1 : -1]
            of_steps.append(float(predicted[torch.arange(size), torch.from_numpy(row[-size:])].mean()))
        scores[index] = np.mean(of_steps)
    return scores


def _steps(work: Work) -> list[np.ndarray | str]:
    return [sizes if isinstance(sizes, str) else sizes.steps for sizes in work.sizes]


@dataclasses.dataclass
class CostlessPrograms:
    """In place of `WindowPrograms`; may die before a batch."""

    log_likelihood: Callable[[WindowBatch], np.ndarray] = lambda batch: batch.targets_s.astype(np.float32)
    dies_at: int | None = None
    encoded: list[np.ndarray] = dataclasses.field(default_factory=list)
    scored: list[WindowBatch] = dataclasses.field(default_factory=list)

    def encode(self, prompts_ns: np.ndarray) -> np.ndarray:
        self.encoded.append(prompts_ns)
        return prompts_ns

    def log_likelihoods(self, prefixes: np.ndarray, batch: WindowBatch) -> np.ndarray:
        assert prefixes is self.encoded[-1]
        if len(self.scored) == self.dies_at:
            raise KeyboardInterrupt
        self.scored.append(batch)
        return self.log_likelihood(batch)


@pytest.fixture(scope="module")
def one_device(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return _scores(setting, tmp_path_factory.mktemp("one_device"))[0]


@pytest.mark.parametrize("context", [0, 2])
def test_scores_are_those_of_every_step_in_a_row_of_its_own(setting: Setting, tmp_path: Path, context: int) -> None:
    options = dataclasses.replace(OPTIONS, context=context)
    found, work = _scores(setting, tmp_path, options)
    steps = _steps(work)
    assert max(map(len, steps)) > 8
    expected = _by_definition(setting, steps, options)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert np.isnan(found[UNRENDERABLE])
    assert np.isfinite(np.delete(found, UNRENDERABLE)).all()
    one_more = _by_definition(setting, steps[:8], dataclasses.replace(options, context=context + 1))
    moved = np.nanmax(np.abs(expected[:8] - one_more))
    assert moved > 10 * 2e-5 * np.nanmax(np.abs(expected)), "the student's numbers do not depend on the context"


def test_with_enough_context_every_token_has_its_log_likelihood_in_one_pass(setting: Setting, tmp_path: Path) -> None:
    found, work = _scores(setting, tmp_path, dataclasses.replace(OPTIONS, context=1_000))
    model = setting.student
    for index in (0, 1):
        item = render_trajectory(setting.chat, setting.pool.trajectories[index], OPTIONS.max_length)
        row = np.concatenate([item.prompt_tokens, item.target_tokens])
        logits = np.asarray(model.logits(jnp.asarray(row[None, :-1])), np.float64)[0, len(item.prompt_tokens) - 1 :]
        gold = np.take_along_axis(logits, item.target_tokens[:, None], -1)[:, 0]
        log_probs = gold - np.log(np.exp(logits).sum(-1))
        ends = np.cumsum(_steps(work)[index])
        expected = np.mean([part.mean() for part in np.split(log_probs, ends[:-1])])
        np.testing.assert_allclose(found[index], expected, rtol=2e-5)


@pytest.mark.parametrize(("data", "tensor", "axes"), [(3, 1, ()), (1, 2, (TENSOR,)), (2, 2, (DATA, TENSOR))], ids=str)
def test_every_layout_gives_the_scores_of_one_device(
    setting: Setting, one_device: np.ndarray, tmp_path: Path, data: int, tensor: int, axes: tuple[str, ...]
) -> None:
    mesh = make_mesh(MeshConfig(data, tensor), jax.devices()[: data * tensor])
    student, _ = load_student(setting.folder, mesh=mesh, dtype="float32", parameter_axes=axes)
    found, _ = _scores(dataclasses.replace(setting, student=student), tmp_path, OPTIONS, data, tensor)
    np.testing.assert_allclose(found, one_device, rtol=2e-5)


def test_prompts_are_encoded_once_each_and_every_answer_is_scored_once(setting: Setting, tmp_path: Path) -> None:
    work = plan_work(setting.pool, setting.chat, OPTIONS, data_shards=2, directory=tmp_path)
    prompts = [answers for part in work.parts for answers in part.prompts]
    trajectories = setting.pool.trajectories
    assert {trajectories[answers[0]].prompt for answers in prompts} == {t.prompt for t in trajectories}
    assert len(prompts) == work.num_prompts == SIZES.num_problems
    members = sorted(member for part in work.parts for member in part.members)
    assert members == [index for index in range(len(trajectories)) if index != UNRENDERABLE]
    lengths = [work.sizes[answers[0]].prompt for answers in prompts]
    assert lengths == sorted(lengths, reverse=True)


def test_a_killed_run_continues_after_its_last_batch_and_encodes_the_prompts_of_a_part_once(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lark_jax.scoring.part_streams.SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr("lark_jax.scoring.local_naturalness.windows.SHORTEST_ROW", 64)
    # The keys of a prompt take as much as a batch: each prompt is a part of its own, of several batches.
    options = dataclasses.replace(OPTIONS, tokens_per_batch=128)
    programs = CostlessPrograms()
    monkeypatch.setattr(scorer, "WindowPrograms", lambda *_, **__: programs)
    undisturbed, work = _scores(setting, tmp_path / "undisturbed", options)
    encoded, batches = len(programs.encoded), len(programs.scored)
    assert encoded == len(work.parts) == SIZES.num_problems
    assert batches > 2 * encoded
    for dies_at in range(0, batches, 2):
        programs.encoded, programs.scored, programs.dies_at = [], [], dies_at
        with pytest.raises(KeyboardInterrupt):
            _scores(setting, tmp_path / str(dies_at), options)
        programs.dies_at = None
        again, _ = _scores(setting, tmp_path / str(dies_at), options)
        np.testing.assert_array_equal(again, undisturbed)
        assert batches <= len(programs.scored) <= batches + BATCHES_IN_FLIGHT + 1
        assert encoded <= len(programs.encoded) <= encoded + BATCHES_IN_FLIGHT + 1


def test_the_loads_of_batches_add_up_to_those_of_the_plan(setting: Setting, tmp_path: Path) -> None:
    """The time left is right in the end, although batches are known only when their part is rendered."""
    architecture = setting.student.architecture
    work = plan_work(setting.pool, setting.chat, OPTIONS, data_shards=2, directory=tmp_path)
    for part in work.parts:
        batches = render_part(work, part, {}).batches
        planned = load_of_part(architecture, work, part)
        total = sum((load_of_batch(architecture, batch) for batch in batches), NO_LOAD)
        assert (total.items, total.tokens) == (planned.items, planned.tokens)
        assert total.flops == pytest.approx(planned.flops)
        assert total.padded_tokens == sum(batch.tokens_bt.size for batch in batches)


@pytest.mark.parametrize(
    "change", [{"context": 3}, {"split": r"(?P<end>\n)"}, {"max_length": 300}, {"tokens_per_batch": 1_024}]
)
def test_what_decides_the_windows_is_in_the_plan(setting: Setting, tmp_path: Path, change: dict) -> None:
    def plan(options: NaturalnessOptions) -> str:
        return plan_work(setting.pool, setting.chat, options, data_shards=1, directory=tmp_path).plan

    assert plan(dataclasses.replace(OPTIONS, **change)) != plan(OPTIONS)


@pytest.mark.parametrize("number", [np.nan, -np.inf])
def test_numbers_of_the_student_that_are_not_finite_leave_no_score(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: float
) -> None:
    # In the first step of the first answer of each part.
    programs = CostlessPrograms(lambda batch: np.where(batch.step_ids_s == 0, number, -1.0))
    monkeypatch.setattr(scorer, "WindowPrograms", lambda *_, **__: programs)
    found, work = _scores(setting, tmp_path)
    first = [part.members[0] for part in work.parts]
    assert sorted(np.flatnonzero(np.isnan(found))) == sorted([*first, UNRENDERABLE])
    np.testing.assert_allclose(found[~np.isnan(found)], -1.0)
