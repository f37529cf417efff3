"""Local Naturalness against its definition: every step in a row of its own, through transformers, in float32."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from lark_jax.config import MeshConfig, SyntheticConfig
from lark_jax.files import write_json
from lark_jax.pool import read_pool
from lark_jax.pool.chat import ChatFormat, load_chat_format, render_trajectory
from lark_jax.pool.records import Message, Pool, Trajectory
from lark_jax.pool.synthetic import write_synthetic
from lark_jax.scoring.local_naturalness import (
    NaturalnessOptions,
    assemble_local_naturalness,
    plan_work,
    score_local_naturalness,
)
from lark_jax.sharding import make_mesh
from lark_jax.students import Decoder, load_student, random_student, read_architecture, save_new_student

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = SyntheticConfig(num_problems=3, num_test_problems=2, num_pretrain_problems=60, rollouts=1)
OPTIONS = NaturalnessOptions(max_length=400, tokens_per_batch=1_024, vocab_chunk=200, context=2)
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
    trajectories[UNRENDERABLE + 1] = _answering(trajectories[UNRENDERABLE + 1], "3. " * 400)
    return Pool(tuple(trajectories))


def _answering(trajectory: Trajectory, response: str) -> Trajectory:
    return dataclasses.replace(trajectory, messages=(*trajectory.prompt, Message("assistant", response)))


def _scores(setting: Setting, folder: Path, options: NaturalnessOptions = OPTIONS, data: int = 1, tensor: int = 1):
    mesh = make_mesh(MeshConfig(data, tensor), jax.devices()[: data * tensor])
    work = plan_work(setting.pool, setting.chat, options, row_multiple=data, directory=folder)
    score_local_naturalness(setting.student, work, mesh=mesh)
    return np.array(assemble_local_naturalness(work)), work


def _by_definition(setting: Setting, steps_of, options: NaturalnessOptions) -> np.ndarray:
    """Each step alone: prompt, at most `context` steps, the step; nothing is shared or batched."""
    model = transformers.AutoModelForCausalLM.from_pretrained(setting.folder, dtype=torch.float32).eval()
    scores = np.full(len(setting.pool.trajectories), np.nan)
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


def _step_sizes(work):
    return [sizes if isinstance(sizes, str) else sizes.steps for sizes in work.sizes]


@pytest.mark.parametrize("context", [0, 2, 4])
def test_scores_are_those_of_every_step_in_a_row_of_its_own(setting: Setting, tmp_path: Path, context: int) -> None:
    options = dataclasses.replace(OPTIONS, context=context)
    found, work = _scores(setting, tmp_path, options)
    steps = _step_sizes(work)
    assert max(map(len, steps)) > 12
    np.testing.assert_allclose(found, _by_definition(setting, steps, options), rtol=2e-5)
    everything = _by_definition(setting, steps, dataclasses.replace(options, context=1_000))
    assert np.nanmax(np.abs(found - everything)) > 1e-2, "a student that does not mind what it sees"
