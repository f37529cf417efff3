"""The two compiled programs: prompts -> their keys and values; packed windows -> log-likelihoods of scored tokens.

As in `scoring.step`, everything happens inside one `shard_map`: prompts and rows are split over `data`, collectives are
written down.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lark_jax.ops.token_statistics import token_statistics
from lark_jax.runtime.sharding import DATA, TENSOR, parameter_sharding, parameter_spec, split_rows
from lark_jax.scoring.local_naturalness.windows import WindowBatch
from lark_jax.scoring.parameter_axes import check_tensor_axis
from lark_jax.students.attention.prefix import RowLayout
from lark_jax.students.decoder import Decoder
from lark_jax.students.parallel import ParameterSplit
from lark_jax.students.parameters import flatten_parameters, parameter_shapes, replace_parameters
from lark_jax.students.prefixes import Continuations, Prefixes, continue_prefixes, encode_prefixes

Parameters = dict[str, jax.Array]


class WindowPrograms:
    """Both programs over `mesh`, for one student; each is compiled once for every shape of its arguments.

    Where the mesh spans several processes, each passes the same arrays.
    """

    def __init__(self, student: Decoder, mesh: Mesh, vocab_chunk: int, *, parameter_axes: Sequence[str] = ()) -> None:
        """See `scoring.step.make_score_step`.

        Raises:
          ConfigError: the mesh does not fit the student, see `check_tensor_axis`.
        """
        check_tensor_axis(student.architecture, mesh)
        self._mesh = mesh
        self._parameters = {
            name: jax.device_put(value, parameter_sharding(name, value.shape, mesh, parameter_axes))
            for name, value in flatten_parameters(nnx.state(student)).items()
        }
        self._encode, self._score = _programs(student, mesh, vocab_chunk, parameter_axes)

    def encode(self, prompts_ns: np.ndarray) -> Prefixes:
        """Of int32 prompts [prompts, tokens], prompts a multiple of the `data` axis; whole on each device along it."""
        return self._encode(self._parameters, split_rows(prompts_ns, self._mesh))

    def log_likelihoods(self, prefixes: Prefixes, batch: WindowBatch) -> jax.Array:
        """log pi(token | prompt, window before it) of each scored token, nats, fp32 [scored], not waited for."""
        put = functools.partial(split_rows, mesh=self._mesh)
        layout = RowLayout(*map(put, (batch.prefix_b, batch.prefix_lengths_b, batch.segment_ids_bt)))
        rows = Continuations(put(batch.tokens_bt), put(batch.positions_bt), layout)
        return self._score(self._parameters, prefixes, rows, put(batch.wanted_s), put(batch.targets_s))


def _programs(
    student: Decoder, mesh: Mesh, vocab_chunk: int, parameter_axes: Sequence[str]
) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
    """Of `student` only shapes are kept."""
    graph, state = nnx.split(student)
    state = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), state)
    shapes = parameter_shapes(student.architecture)
    specs = {name: parameter_spec(name, shape, mesh, parameter_axes) for name, shape in shapes.items()}
    split = ParameterSplit(specs)
    head = student.head_name

    def encode_local(parameters: Parameters, prompts_ns: jax.Array) -> Prefixes:
        own = encode_prefixes(nnx.merge(graph, replace_parameters(state, parameters)), prompts_ns, split)
        # The windows of a prompt may lie on any device.
        return jax.tree.map(lambda x_lnskd: lax.all_gather(x_lnskd, DATA, axis=1, tiled=True), own)

    def score_local(
        parameters: Parameters, prefixes: Prefixes, rows: Continuations, wanted_s: jax.Array, targets_s: jax.Array
    ) -> jax.Array:
        model = nnx.merge(graph, replace_parameters(state, parameters))
        hidden_sd = continue_prefixes(model, prefixes, rows, wanted_s, split)
        statistics = token_statistics(
            hidden_sd,
            split.head(head, model.head_weight(), model.dtype),
            targets_s,
            vocab_chunk=vocab_chunk,
            axis_name=split.vocabulary_axis(head),
        )
        # A number per scored token: with them everywhere, every process can read the result.
        return lax.all_gather(-statistics.cross_entropy, DATA, tiled=True)

    heads_are_split = TENSOR in specs["layers.self_attn.k_proj.weight"]
    by_heads = PartitionSpec(None, None, None, TENSOR if heads_are_split else None)
    by_rows = PartitionSpec(DATA)

    def sharded(function, in_specs, out_specs) -> jax.stages.Wrapped:  # type: ignore[no-untyped-def]
        # check_vma: attention kernels do not say over which axes their results vary.
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))

    return (
        sharded(encode_local, (specs, by_rows), by_heads),
        sharded(score_local, (specs, by_heads, by_rows, by_rows, by_rows), PartitionSpec()),
    )
