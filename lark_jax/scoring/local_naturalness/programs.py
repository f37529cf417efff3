"""The two compiled programs: prompts -> their keys and values; packed windows -> log-likelihoods of scored tokens."""

import functools
from collections.abc import Mapping

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lark_jax.ops.token_statistics import token_statistics
from lark_jax.runtime.sharding import DATA, TENSOR, split_rows
from lark_jax.scoring.local_naturalness.windows import WindowBatch
from lark_jax.students.attention.prefix import RowLayout
from lark_jax.students.decoder import Decoder
from lark_jax.students.prefixes import Continuations, Prefixes, continue_prefixes, encode_prefixes
from lark_jax.students.sharded import ShardedStudent

Parameters = Mapping[str, jax.Array]


class WindowPrograms:
    """Both programs over `mesh`, for one student; each is compiled once for every shape of its arguments.

    If the mesh spans several processes, each passes the same arrays.
    """

    def __init__(self, student: Decoder, mesh: Mesh, vocab_chunk: int) -> None:
        """See `scoring.step.make_score_step`.

        Raises:
          ConfigError: the mesh does not fit the student, see `check_tensor_axis`.
        """
        sharded, self._parameters = ShardedStudent.on_mesh(student, mesh)
        self._mesh = mesh
        self._encode = _compile_encode(sharded)
        self._score = _compile_score(sharded, vocab_chunk)

    def encode(self, prompts_ns: np.ndarray) -> Prefixes:
        """Keys and values of int32 prompts [prompts, tokens], whole along `data`, which must divide the prompts."""
        return self._encode(self._parameters, split_rows(prompts_ns, self._mesh))

    def log_likelihoods(self, prefixes: Prefixes, batch: WindowBatch) -> jax.Array:
        """log pi(token | prompt, window before it) of each scored token, nats, fp32 [scored], not waited for."""
        put = functools.partial(split_rows, mesh=self._mesh)
        layout = RowLayout(*map(put, (batch.prefix_b, batch.prefix_lengths_b, batch.segment_ids_bt)))
        rows = Continuations(put(batch.tokens_bt), put(batch.positions_bt), layout)
        return self._score(self._parameters, prefixes, rows, put(batch.wanted_s), put(batch.targets_s))


def _compile_encode(student: ShardedStudent) -> jax.stages.Wrapped:
    def encode_local(parameters: Parameters, prompts_ns: jax.Array) -> Prefixes:
        local = student.local(parameters)
        own = encode_prefixes(local.decoder, prompts_ns, local.split)
        # The windows of a prompt may be on any device.
        return jax.tree.map(lambda x_lnskd: lax.all_gather(x_lnskd, DATA, axis=1, tiled=True), own)

    return student.compile(encode_local, (student.specs, PartitionSpec(DATA)), _prefix_spec(student))


def _compile_score(student: ShardedStudent, vocab_chunk: int) -> jax.stages.Wrapped:
    def score_local(
        parameters: Parameters, prefixes: Prefixes, rows: Continuations, wanted_s: jax.Array, targets_s: jax.Array
    ) -> jax.Array:
        local = student.local(parameters)
        statistics = token_statistics(
            continue_prefixes(local.decoder, prefixes, rows, wanted_s, local.split),
            local.head_vd,
            targets_s,
            vocab_chunk=vocab_chunk,
            axis_name=local.vocabulary_axis,
        )
        # A number per scored token. With all of them on every device, every process can read the result.
        return lax.all_gather(-statistics.cross_entropy, DATA, tiled=True)

    by_rows = PartitionSpec(DATA)
    in_specs = (student.specs, _prefix_spec(student), by_rows, by_rows, by_rows)
    return student.compile(score_local, in_specs, PartitionSpec())


def _prefix_spec(student: ShardedStudent) -> PartitionSpec:
    """Devices along `tensor` have the keys and values of their own heads."""
    heads_are_split = TENSOR in student.specs["layers.self_attn.k_proj.weight"]
    return PartitionSpec(None, None, None, TENSOR if heads_are_split else None)
