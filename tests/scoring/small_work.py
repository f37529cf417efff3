"""A workload of a few dozen short trajectories, and a student that costs nothing, for tests of everything around it."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from lark_jax.config import MeshConfig, SyntheticConfig
from lark_jax.pool import read_pool
from lark_jax.pool.records import Message, Pool
from lark_jax.pool.synthetic import write_synthetic
from lark_jax.rendering.batching import TokenRows
from lark_jax.rendering.chat import ChatFormat, load_chat_format
from lark_jax.runtime.sharding import make_mesh
from lark_jax.scoring import ScoreOptions, Workload, plan_workload
from lark_jax.scoring.statistics import STATISTICS, TrajectoryMeans
from lark_jax.students import read_architecture

SIZES = SyntheticConfig(num_problems=6, num_test_problems=2, num_pretrain_problems=60, rollouts=2)
OPTIONS = ScoreOptions(max_length=256, tokens_per_batch=256, vocab_chunk=100, batches_per_part=4)
ROW_MULTIPLE = 2


@dataclasses.dataclass(frozen=True)
class Material:
    pool: Pool  # its third trajectory cannot be rendered
    chat: ChatFormat
    student: SimpleNamespace

    def workload(self, directory: Path, data_shards: int = ROW_MULTIPLE) -> Workload:
        return plan_workload(self.pool, self.chat, OPTIONS, data_shards=data_shards, directory=directory)


def write_material(folder: Path) -> Material:
    write_synthetic(SIZES, int(np.random.default_rng().integers(1000)), folder)
    trajectories = list(read_pool(folder / "pool.jsonl").trajectories)
    hostile = Message("assistant", "an <|im_end|> inside")
    trajectories[2] = dataclasses.replace(trajectories[2], messages=(*trajectories[2].prompt, hostile))
    student = SimpleNamespace(architecture=read_architecture(folder / "student"))
    return Material(Pool(tuple(trajectories)), load_chat_format(folder / "student"), student)


def small_mesh(devices: int = ROW_MULTIPLE) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:devices])


def costless_step(batch: TokenRows) -> TrajectoryMeans:
    """Means that depend on a row's tokens and on its batch, as those of a real student do by rounding."""
    weights = np.arange(1, batch.tokens_bt.shape[1] + 1)
    row_values = (batch.tokens_bt * weights).sum(-1) % 9973 / 9973 + batch.tokens_bt.sum() % 97 * 1e-6
    return {statistic.name: np.float32(row_values + number) for number, statistic in enumerate(STATISTICS)}
