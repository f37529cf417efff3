"""The compiled scoring step: rows of tokens -> means per trajectory, in one `shard_map`."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lark_jax.ops.token_statistics import token_statistics
from lark_jax.rendering.batching import TokenRows
from lark_jax.runtime.sharding import DATA, split_rows
from lark_jax.runtime.sharding import rows as rows_sharding
from lark_jax.scoring.statistics import TrajectoryMeans, trajectory_means
from lark_jax.students.decoder import Decoder
from lark_jax.students.sharded import ShardedStudent

# Tokens that pass through an MLP together, by platform. On a CPU larger blocks leave the cache; elsewhere all at once.
MLP_BLOCKS = {"cpu": 512}

ScoreStep = Callable[[TokenRows], TrajectoryMeans]


def make_score_step(student: Decoder, mesh: Mesh, vocab_chunk: int) -> ScoreStep:
    """The step over `mesh`, compiled once for every shape of rows; see `ShardedStudent.on_mesh` for the layout.

    It takes rows [R, T], where the `data` axis divides R, and returns means [R], whole on every device, without waiting
    for them. If the mesh spans several processes, each passes the same rows.

    Raises:
      ConfigError: the mesh does not fit the student, see `check_tensor_axis`.
    """
    sharded, parameters = ShardedStudent.on_mesh(student, mesh)
    compiled = compile_score_step(sharded, vocab_chunk)

    def step(batch: TokenRows) -> TrajectoryMeans:
        arrays = (split_rows(array, mesh) for array in (batch.tokens_bt, batch.targets_bt, batch.mask_bt))
        return compiled(parameters, *arrays)

    return step


def compile_score_step(student: ShardedStudent, vocab_chunk: int) -> jax.stages.Wrapped:
    """The step as a function of (parameters, tokens, targets, mask), lazily compiled; see `token_statistics`."""
    mlp_block = MLP_BLOCKS.get(student.mesh.devices.flat[0].platform)

    def score_local_rows(
        parameters: Mapping[str, jax.Array], tokens_bt: jax.Array, targets_bt: jax.Array, mask_bt: jax.Array
    ) -> TrajectoryMeans:
        local = student.local(parameters)
        statistics = token_statistics(
            local.decoder(tokens_bt, split=local.split, mlp_block=mlp_block),
            local.head_vd,
            targets_bt,
            vocab_chunk=vocab_chunk,
            axis_name=local.vocabulary_axis,
        )
        means = trajectory_means(statistics, mask_bt)
        # A few numbers per row. With all of them on every device, every process can read the result.
        return jax.tree.map(lambda mean_b: lax.all_gather(mean_b, DATA, tiled=True), means)

    by_rows = PartitionSpec(DATA)
    return student.compile(score_local_rows, (student.specs, by_rows, by_rows, by_rows), PartitionSpec())


def trace_score_step(student: ShardedStudent, *, vocab_chunk: int, rows: int, length: int) -> jax.stages.Traced:
    """The step for rows [rows, length], of the whole batch, traced without any array; devices may be absent.

    Its `jaxpr` has every collective; its `lower().compile()` is the program.
    """
    sharding = rows_sharding(student.mesh)
    tokens_bt = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=sharding)
    mask_bt = jax.ShapeDtypeStruct((rows, length), jnp.float32, sharding=sharding)
    return compile_score_step(student, vocab_chunk).trace(student.parameters, tokens_bt, tokens_bt, mask_bt)
