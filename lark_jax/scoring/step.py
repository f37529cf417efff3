"""The compiled scoring step: rows of tokens -> means per trajectory."""

from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from lark_jax.pool.batching import TokenRows
from lark_jax.scoring.reductions import TrajectoryMeans, trajectory_means
from lark_jax.scoring.token_statistics import token_statistics
from lark_jax.sharding import DATA, replicated, rows
from lark_jax.students.decoder import Decoder

ScoreStep = Callable[[TokenRows], TrajectoryMeans]


def make_score_step(student: Decoder, mesh: Mesh, vocab_chunk: int) -> ScoreStep:
    """Compiles the step: rows are split over `data`, parameters are replicated, nothing is communicated.

    The step takes rows [R, T] (R a multiple of the `data` axis) and returns means [R], still on the devices.
    """
    graph, state = nnx.split(student)
    state = jax.device_put(state, replicated(mesh))

    def score_local_rows(
        state: nnx.State, tokens_bt: jax.Array, targets_bt: jax.Array, mask_bt: jax.Array
    ) -> TrajectoryMeans:
        model = nnx.merge(graph, state)
        hidden_btd = model(tokens_bt)
        statistics = token_statistics(hidden_btd, model.head_weight(), targets_bt, vocab_chunk=vocab_chunk)
        return trajectory_means(statistics, mask_bt)

    sharded = jax.shard_map(
        score_local_rows,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(DATA), PartitionSpec(DATA), PartitionSpec(DATA)),
        out_specs=PartitionSpec(DATA),
    )
    compiled = jax.jit(sharded)

    def step(batch: TokenRows) -> TrajectoryMeans:
        arrays = jax.device_put((batch.tokens_bt, batch.targets_bt, batch.mask_bt), rows(mesh))
        return compiled(state, *arrays)

    return step
