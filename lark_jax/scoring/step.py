"""The compiled scoring step: rows of tokens -> means per trajectory, everything inside one `shard_map`.

Kernels see the arrays of one device, and every collective is written down: here, in `students.parallel` and in
`token_statistics`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from lark_jax.ops.token_statistics import token_statistics
from lark_jax.rendering.batching import TokenRows
from lark_jax.runtime.sharding import DATA, parameter_sharding, parameter_spec, split_rows
from lark_jax.runtime.sharding import rows as rows_sharding
from lark_jax.scoring.parameter_axes import check_tensor_axis
from lark_jax.scoring.statistics import TrajectoryMeans, trajectory_means
from lark_jax.students.architecture import Architecture
from lark_jax.students.decoder import Decoder
from lark_jax.students.parallel import ParameterSplit
from lark_jax.students.parameters import (
    abstract_decoder,
    flatten_parameters,
    parameter_shapes,
    replace_parameters,
    shapes_of,
)

# Tokens that pass through an MLP together, by platform. On a CPU larger blocks leave the cache; elsewhere all at once.
MLP_BLOCKS = {"cpu": 512}

ScoreStep = Callable[[TokenRows], TrajectoryMeans]


def make_score_step(student: Decoder, mesh: Mesh, vocab_chunk: int, *, parameter_axes: Sequence[str] = ()) -> ScoreStep:
    """The step over `mesh`; it is compiled once for every shape of rows.

    It takes rows [R, T], R a multiple of the `data` axis, and returns means [R], whole on every device and not waited
    for. Where the mesh spans several processes, each passes the same rows.

    Args:
      vocab_chunk: see `token_statistics`.
      parameter_axes: mesh axes over which parameters are split, see `sharding.parameter_spec`; they are moved where
        they lie otherwise.

    Raises:
      ConfigError: the mesh does not fit the student, see `check_tensor_axis`.
    """
    compiled = jitted_score_step(student, mesh, vocab_chunk, parameter_axes)
    parameters = {
        name: jax.device_put(value, parameter_sharding(name, value.shape, mesh, parameter_axes))
        for name, value in flatten_parameters(nnx.state(student)).items()
    }

    def step(batch: TokenRows) -> TrajectoryMeans:
        arrays = (split_rows(array, mesh) for array in (batch.tokens_bt, batch.targets_bt, batch.mask_bt))
        return compiled(parameters, *arrays)

    return step


def trace_score_step(
    architecture: Architecture,
    mesh: Mesh,
    *,
    dtype: DTypeLike,
    vocab_chunk: int,
    parameter_axes: Sequence[str],
    attention_backend: str | None,
    rows: int,
    length: int,
) -> jax.stages.Traced:
    """The same step for rows [rows, length], traced without any array; `mesh` may be of devices that are not there.

    Its `jaxpr` has every collective; its `lower().compile()` is the program.

    Args:
      dtype: of parameters and computation.
      rows: of the whole batch.

    Raises:
      ConfigError: the mesh does not fit the student, see `check_tensor_axis`.
    """
    student = abstract_decoder(architecture, dtype, dtype, attention_backend=attention_backend)
    parameters = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=parameter_sharding(name, shape, mesh, parameter_axes))
        for name, shape in parameter_shapes(architecture).items()
    }
    tokens_bt = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=rows_sharding(mesh))
    mask_bt = jax.ShapeDtypeStruct((rows, length), jnp.float32, sharding=rows_sharding(mesh))
    return jitted_score_step(student, mesh, vocab_chunk, parameter_axes).trace(
        parameters, tokens_bt, tokens_bt, mask_bt
    )


def jitted_score_step(
    student: Decoder, mesh: Mesh, vocab_chunk: int, parameter_axes: Sequence[str]
) -> jax.stages.Wrapped:
    """The step as a function of (parameters by name, tokens, targets, mask); of `student` only shapes are kept."""
    check_tensor_axis(student.architecture, mesh)
    graph, state = nnx.split(student)
    state = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), state)
    specs = {name: parameter_spec(name, shape, mesh, parameter_axes) for name, shape in shapes_of(student).items()}
    split = ParameterSplit(specs)
    head = student.head_name
    mlp_block = MLP_BLOCKS.get(mesh.devices.flat[0].platform)

    def score_local_rows(
        parameters: dict[str, jax.Array], tokens_bt: jax.Array, targets_bt: jax.Array, mask_bt: jax.Array
    ) -> TrajectoryMeans:
        model = nnx.merge(graph, replace_parameters(state, parameters))
        hidden_btd = model(tokens_bt, split=split, mlp_block=mlp_block)
        statistics = token_statistics(
            hidden_btd,
            split.head(head, model.head_weight(), model.dtype),
            targets_bt,
            vocab_chunk=vocab_chunk,
            axis_name=split.vocabulary_axis(head),
        )
        means = trajectory_means(statistics, mask_bt)
        # A few numbers per row: with them everywhere, every process can read the result.
        return jax.tree.map(lambda mean_b: lax.all_gather(mean_b, DATA, tiled=True), means)

    by_rows = PartitionSpec(DATA)
    sharded = jax.shard_map(
        score_local_rows,
        mesh=mesh,
        in_specs=(specs, by_rows, by_rows, by_rows),
        out_specs=PartitionSpec(),
        check_vma=False,  # attention kernels do not say over which axes their results vary
    )
    return jax.jit(sharded)
