"""A training run of a second or two."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lark_jax.config import FinetuneConfig, MeshConfig
from lark_jax.finetuning import CHECKPOINTS, Example, FinetuneResult, finetune, weighted_examples
from lark_jax.finetuning.finished_run import RECORD
from lark_jax.rendering.chat import RenderedTrajectory
from lark_jax.runtime.sharding import make_mesh
from lark_jax.students.architecture import Architecture, RopeScaling
from lark_jax.students.decoder import Decoder
from lark_jax.students.parameters import flatten_parameters

VOCAB_SIZE = 64
PAD_ID = 0
ARCHITECTURE = Architecture(
    model_type="qwen2",
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    rope_scaling=RopeScaling(),
    max_position_embeddings=256,
    tie_word_embeddings=False,
    attention_bias=True,
    qk_norm=False,
)
CONFIG = FinetuneConfig(
    learning_rate=1e-2,
    epochs=3,
    batch_size=4,
    dtype="float32",
    tokens_per_batch=64,
    remat="none",
    vocab_chunk=48,
    checkpoint_every=3,
)


def tiny_student(seed: int = 0) -> Decoder:
    return Decoder(ARCHITECTURE, rngs=nnx.Rngs(seed))


def random_trajectory(rng: np.random.Generator, problem_id: str, candidate_id: str) -> RenderedTrajectory:
    prompt_length, target_length = rng.integers(1, 20), rng.integers(1, 40)
    prompt_tokens = rng.integers(1, VOCAB_SIZE, prompt_length, dtype=np.int32)
    target_tokens = rng.integers(1, VOCAB_SIZE, target_length, dtype=np.int32)
    return RenderedTrajectory(problem_id, candidate_id, prompt_tokens, target_tokens, truncated=False)


def random_examples(seed: int, problems: int, candidates: int) -> tuple[Example, ...]:
    """`candidates` trajectories for each problem, with random weights that sum to 1 over a problem."""
    rng = np.random.default_rng(seed)
    rendered = [random_trajectory(rng, f"p{p}", f"c{c}") for p in range(problems) for c in range(candidates)]
    weights = rng.dirichlet(np.ones(candidates), size=problems).reshape(-1)
    return weighted_examples(rendered, weights.tolist())


def run(
    directory: Path,
    config: FinetuneConfig = CONFIG,
    *,
    student: Decoder | None = None,
    examples: Sequence[Example] | None = None,
    held_out: Sequence[Example] = (),
    seed: int = 11,
    num_devices: int = 1,
) -> FinetuneResult:
    return finetune(
        tiny_student() if student is None else student,
        random_examples(7, 6, 3) if examples is None else examples,
        config,
        seed=seed,
        mesh=make_mesh(MeshConfig(), jax.devices()[:num_devices]),
        pad_id=PAD_ID,
        directory=directory,
        held_out=held_out,
    )


def copy_with_checkpoint(source: Path, target: Path, step: int) -> None:
    """Makes `target` look like `source` when it was killed some time after the checkpoint of `step`."""
    shutil.copytree(source, target)
    (target / RECORD).unlink()
    for checkpoint in (target / CHECKPOINTS).iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)


def weights_of(student: Decoder) -> dict[str, np.ndarray]:
    parameters = flatten_parameters(nnx.state(student, nnx.Param))
    return {name: np.asarray(value) for name, value in parameters.items()}
