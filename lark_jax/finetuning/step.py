"""The two compiled functions of training: add one micro-batch's gradient, and apply an optimizer step.

Trained parameters (see `parameter_sets`), Adam's moments and the gradient sums are float32; frozen parameters have the
compute dtype. All of them are split over `data` (FSDP) and `tensor`, as in `sharding.PARAMETER_SPECS`; rows are split
over `data`. Gradients come out of one `shard_map`: attention kernels see the arrays of one device, and every collective
is explicit, in `students.parallel` and `ops.weighted_cross_entropy`. Each layer is gathered where it is used, in the
compute dtype; gradients are summed over devices in float32.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec, Sharding

from lark_jax.errors import ConfigError
from lark_jax.finetuning.data import MicroBatch
from lark_jax.finetuning.optimizer import Parameters
from lark_jax.finetuning.parameter_sets import NOTHING_FROZEN, abstract_frozen, abstract_trained
from lark_jax.ops.weighted_cross_entropy import weighted_cross_entropy
from lark_jax.runtime.sharding import DATA, replicated, split_rows
from lark_jax.runtime.sharding import rows as rows_sharding
from lark_jax.students.decoder import Decoder
from lark_jax.students.parameters import flatten_parameters
from lark_jax.students.sharded import ShardedStudent


class TrainState(NamedTuple):
    """All that a restarted run needs, except for the number of completed steps."""

    parameters: Parameters  # the trained ones: float32, dotted name -> array
    optimizer_state: optax.OptState


class StepSums(NamedTuple):
    """Sums over the micro-batches of the current optimizer step."""

    gradients: Parameters  # float32
    loss: jax.Array  # float32 scalar


class Rows(NamedTuple):
    """A `MicroBatch` on the devices."""

    tokens_bt: jax.Array
    targets_bt: jax.Array
    token_weights_bt: jax.Array  # float32: the factor of each token's cross-entropy in Eq. 1
    segment_ids_bt: jax.Array | None  # packed rows only


class Applied(NamedTuple):
    """The result of one optimizer step. If `finite` is false, `state` is the old one."""

    state: TrainState
    sums: StepSums  # zeros, for the next step
    grad_norm: jax.Array  # float32 scalar, before clipping
    finite: jax.Array  # bool scalar: loss and gradient norm are finite


@dataclass(frozen=True)
class TrainStep:
    """Compiled functions for one student and optimizer. Both consume (donate) the buffers that they replace."""

    # The second result is the cross-entropy of every token, float32 [b, t], whole on every device.
    accumulate: Callable[[Parameters, StepSums, Rows], tuple[StepSums, jax.Array]]
    apply: Callable[[TrainState, StepSums], Applied]


def make_train_step(
    student: ShardedStudent,
    optimizer: optax.GradientTransformation,
    *,
    vocab_chunk: int,
    frozen: Mapping[str, jax.Array] = NOTHING_FROZEN,
) -> TrainStep:
    """The training functions for `student`, compiled once for every shape of micro-batch.

    The `data` axis must divide the rows of a micro-batch.

    Args:
      student: `ShardedStudent.abstract`.
      frozen: `parameter_sets.frozen_parameters` of the student.

    Raises:
      ConfigError: the devices cannot do what the student's `remat` asks for.
    """
    accumulate = _compile_accumulate(student, vocab_chunk)
    return TrainStep(functools.partial(accumulate, dict(frozen)), _compile_apply(student, optimizer))


def trace_accumulate(
    student: ShardedStudent, *, vocab_chunk: int, rows: int, length: int, packed: bool = False
) -> jax.stages.Traced:
    """`TrainStep.accumulate` for rows [rows, length], traced without any array; devices may be absent.

    Its `jaxpr` has every collective; its `lower().compile()` is the program.

    Args:
      rows: of the whole micro-batch.
      packed: rows have segment ids.
    """
    of_rows: Any = functools.partial(jax.ShapeDtypeStruct, (rows, length), sharding=rows_sharding(student.mesh))
    batch = Rows(of_rows(jnp.int32), of_rows(jnp.int32), of_rows(jnp.float32), of_rows(jnp.int32) if packed else None)
    arguments = (abstract_frozen(student), abstract_trained(student), abstract_sums(student), batch)
    return _compile_accumulate(student, vocab_chunk).trace(*arguments)


def trace_apply(student: ShardedStudent, optimizer: optax.GradientTransformation) -> jax.stages.Traced:
    """`TrainStep.apply`, traced without any array; devices may be absent."""
    return _compile_apply(student, optimizer).trace(abstract_state(student, optimizer), abstract_sums(student))


def _compile_accumulate(student: ShardedStudent, vocab_chunk: int) -> jax.stages.Wrapped:
    """(frozen, parameters, sums, rows) -> sums and the cross-entropy of every token."""
    _check_remat(student)

    def accumulate(
        frozen: Parameters, parameters: Parameters, sums: StepSums, batch: Rows
    ) -> tuple[StepSums, jax.Array]:
        def loss_of_own_rows(parameters: Parameters, token_weights_bt: jax.Array) -> jax.Array:
            local = student.local({**frozen, **parameters})
            return weighted_cross_entropy(
                local.decoder(batch.tokens_bt, batch.segment_ids_bt, local.split),
                local.head_vd,
                batch.targets_bt,
                token_weights_bt,
                vocab_chunk=vocab_chunk,
                axis_name=local.vocabulary_axis,
            )

        # The loss is linear in the token weights: its derivative by them is the cross-entropy of every token.
        loss_and_gradients = jax.value_and_grad(loss_of_own_rows, argnums=(0, 1))
        loss, (gradients, cross_entropy_bt) = loss_and_gradients(parameters, batch.token_weights_bt)
        gradients = student.split.total_gradients(gradients)
        sums = StepSums(jax.tree.map(jnp.add, sums.gradients, gradients), sums.loss + lax.psum(loss, DATA))
        return sums, lax.all_gather(cross_entropy_bt, DATA, tiled=True)

    whole: Any = PartitionSpec()
    frozen_specs, trained_specs = (
        {name: student.specs[name] for name in names} for names in (abstract_frozen(student), abstract_trained(student))
    )
    sums_specs = StepSums(trained_specs, whole)  # type: ignore[arg-type]
    return student.compile(
        accumulate,
        in_specs=(frozen_specs, trained_specs, sums_specs, PartitionSpec(DATA)),
        out_specs=(sums_specs, whole),
        out_shardings=(_shardings(abstract_sums(student)), replicated(student.mesh)),
        donate_argnums=2,
    )


def _compile_apply(student: ShardedStudent, optimizer: optax.GradientTransformation) -> jax.stages.Wrapped:
    """(state, sums) -> the result of the step. Elementwise, except for the norm of the gradient."""
    whole: Any = replicated(student.mesh)
    state_shardings, sums_shardings = (
        _shardings(tree) for tree in (abstract_state(student, optimizer), abstract_sums(student))
    )

    def apply(state: TrainState, sums: StepSums) -> Applied:
        grad_norm = optax.global_norm(sums.gradients)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums.loss)
        updates, optimizer_state = optimizer.update(sums.gradients, state.optimizer_state, state.parameters)
        updated = TrainState(optax.apply_updates(state.parameters, updates), optimizer_state)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        return Applied(state, jax.tree.map(jnp.zeros_like, sums), grad_norm, finite)

    return jax.jit(apply, out_shardings=Applied(state_shardings, sums_shardings, whole, whole), donate_argnums=(0, 1))


def abstract_state(student: ShardedStudent, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of the training state: moments as their parameters, counters on every device."""
    parameters: Any = abstract_trained(student)

    def on_mesh(value: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    optimizer_state = optax.tree_map_params(
        optimizer,
        lambda moment, parameter: on_mesh(moment, parameter.sharding),
        jax.eval_shape(optimizer.init, parameters),
        parameters,
        transform_non_params=lambda counter: on_mesh(counter, replicated(student.mesh)),
    )
    return TrainState(parameters, optimizer_state)


def initial_state(start: Decoder, student: ShardedStudent, optimizer: optax.GradientTransformation) -> TrainState:
    """float32 copies of the trained parameters of `start`, laid out as `student`'s, and fresh moments."""
    shardings = _shardings(abstract_state(student, optimizer))
    values = flatten_parameters(nnx.state(start, nnx.Param))
    parameters = {
        name: jnp.array(jax.device_put(values[name], sharding), jnp.float32, copy=True)
        for name, sharding in shardings.parameters.items()
    }
    optimizer_state = jax.jit(optimizer.init, out_shardings=shardings.optimizer_state)(parameters)
    return TrainState(parameters, optimizer_state)


def abstract_sums(student: ShardedStudent) -> StepSums:
    """Shapes and shardings of the sums, without allocating them."""
    gradients: Any = abstract_trained(student)
    loss: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(student.mesh))
    return StepSums(gradients, loss)


def zero_sums(student: ShardedStudent) -> StepSums:
    sums = abstract_sums(student)

    def zeros() -> StepSums:
        return jax.tree.map(lambda value: jnp.zeros(value.shape, value.dtype), sums)

    return jax.jit(zeros, out_shardings=_shardings(sums))()


def put_rows(micro_batch: MicroBatch, mesh: Mesh) -> Rows:
    """Splits rows over `data`. If the mesh spans several processes, each passes the same rows."""
    segment_ids_bt = micro_batch.segment_ids_bt
    return Rows(
        split_rows(micro_batch.tokens_bt, mesh),
        split_rows(micro_batch.targets_bt, mesh),
        split_rows(micro_batch.token_weights_bt, mesh),
        None if segment_ids_bt is None else split_rows(segment_ids_bt, mesh),
    )


def _check_remat(student: ShardedStudent) -> None:
    platform = student.mesh.devices.flat[0].platform
    if student.structure.remat == "offload" and platform == "cpu":
        raise ConfigError(
            "config.finetune.remat: 'offload' moves layer inputs from the device to its host, and a CPU is its own "
            "host; use 'block'"
        )


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda value: value.sharding, tree)
