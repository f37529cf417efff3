"""The two compiled functions of training: add one micro-batch's gradient, and apply an optimizer step.

What is trained (see `parameter_sets`), Adam's moments and gradient sums are float32; what is not is in the compute
dtype. All of it lies on the devices as `sharding.PARAMETER_SPECS` says, split over `data` (FSDP) and `tensor`. Rows
are split over `data`. Gradients come out of one `shard_map`: attention kernels see the arrays of one device, and every
collective is written down, in `students.parallel` and `ops.weighted_cross_entropy`. Each layer is gathered where it is
used, in the compute dtype; the gradient of what is trained is added up over devices in float32.
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
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lark_jax.errors import ConfigError
from lark_jax.finetuning.data import MicroBatch
from lark_jax.finetuning.optimizer import Parameters
from lark_jax.finetuning.parameter_sets import NOTHING_FROZEN, abstract_frozen, abstract_parameters, is_trained
from lark_jax.ops.weighted_cross_entropy import weighted_cross_entropy
from lark_jax.runtime.sharding import DATA, parameter_sharding, parameter_spec, replicated, split_rows
from lark_jax.runtime.sharding import rows as rows_sharding
from lark_jax.scoring.parameter_axes import check_tensor_axis
from lark_jax.students.architecture import Architecture
from lark_jax.students.decoder import Decoder
from lark_jax.students.lora import Lora
from lark_jax.students.parallel import ParameterSplit
from lark_jax.students.parameters import abstract_decoder, flatten_parameters, replace_parameters


class TrainState(NamedTuple):
    """All that a restarted run needs, next to the number of completed steps."""

    parameters: Parameters  # those that are trained: float32, dotted name -> array
    optimizer_state: optax.OptState


class StepSums(NamedTuple):
    """Sums over the micro-batches of the current optimizer step."""

    gradients: Parameters  # float32
    loss: jax.Array  # float32 scalar


class Rows(NamedTuple):
    """A `MicroBatch` on the devices."""

    tokens_bt: jax.Array
    targets_bt: jax.Array
    token_weights_bt: jax.Array  # float32: all of Eq. 1 that the cross-entropy of a token is multiplied by
    segment_ids_bt: jax.Array | None  # packed rows only


class Applied(NamedTuple):
    """What one optimizer step leaves behind. Where `finite` is false, `state` is the old one."""

    state: TrainState
    sums: StepSums  # zeros, for the next step
    grad_norm: jax.Array  # float32 scalar, before clipping
    finite: jax.Array  # bool scalar: loss and gradient norm are finite


@dataclass(frozen=True)
class TrainStep:
    """Compiled functions for one student, optimizer and mesh. Both consume (donate) the buffers that they replace."""

    # Second: the cross-entropy of every token, float32 [b, t], whole on every device.
    accumulate: Callable[[Parameters, StepSums, Rows], tuple[StepSums, jax.Array]]
    apply: Callable[[TrainState, StepSums], Applied]


def make_train_step(
    student: Decoder,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    vocab_chunk: int,
    frozen: Mapping[str, jax.Array] = NOTHING_FROZEN,
) -> TrainStep:
    """Compiles (lazily, once per shape of micro-batch) the training functions for `student` on `mesh`.

    Rows of a micro-batch are a multiple of the `data` axis.

    Args:
      student: structure; its parameters are not looked at.
      frozen: `parameter_sets.frozen_parameters` of the student.

    Raises:
      ConfigError: the mesh does not fit the student, see `check_tensor_axis`; or the devices cannot do what
        `student.remat` asks for.
    """
    accumulate = _jitted_accumulate(student, mesh, vocab_chunk)
    return TrainStep(functools.partial(accumulate, dict(frozen)), _jitted_apply(student, optimizer, mesh))


def trace_accumulate(
    architecture: Architecture,
    mesh: Mesh,
    *,
    dtype: DTypeLike,
    vocab_chunk: int,
    remat: str,
    attention_backend: str | None,
    rows: int,
    length: int,
    packed: bool = False,
    lora: Lora | None = None,
) -> jax.stages.Traced:
    """`TrainStep.accumulate` for rows [rows, length], traced without any array; `mesh` may be of absent devices.

    Its `jaxpr` has every collective; its `lower().compile()` is the program.

    Args:
      dtype: of the computation.
      rows: of the whole micro-batch.
      packed: rows have segment ids.
      lora: the adapter that is trained; None: every parameter is.

    Raises:
      ConfigError: the mesh does not fit the student, see `check_tensor_axis`.
    """
    student = abstract_decoder(architecture, dtype, remat=remat, attention_backend=attention_backend, lora=lora)
    of_rows: Any = functools.partial(jax.ShapeDtypeStruct, (rows, length), sharding=rows_sharding(mesh))
    batch = Rows(of_rows(jnp.int32), of_rows(jnp.int32), of_rows(jnp.float32), of_rows(jnp.int32) if packed else None)
    frozen, trained = (_on_mesh(shapes, mesh) for shapes in (abstract_frozen(student), abstract_parameters(student)))
    return _jitted_accumulate(student, mesh, vocab_chunk).trace(frozen, trained, abstract_sums(student, mesh), batch)


def trace_apply(
    architecture: Architecture, optimizer: optax.GradientTransformation, mesh: Mesh, lora: Lora | None = None
) -> jax.stages.Traced:
    """`TrainStep.apply`, traced without any array; `mesh` may be of absent devices."""
    student = abstract_decoder(architecture, lora=lora)
    state = abstract_state(student, optimizer, mesh)
    return _jitted_apply(student, optimizer, mesh).trace(state, abstract_sums(student, mesh))


def _jitted_accumulate(student: Decoder, mesh: Mesh, vocab_chunk: int) -> jax.stages.Wrapped:
    """(frozen, parameters, sums, rows) -> sums and the cross-entropy of every token; of `student` shapes are kept."""
    check_tensor_axis(student.architecture, mesh)
    _check_remat(student.remat, mesh)
    graph, template = _split_abstract(student)
    frozen_specs, specs = (_specs(shapes, mesh) for shapes in (abstract_frozen(student), abstract_parameters(student)))
    split, head = ParameterSplit({**frozen_specs, **specs}), student.head_name

    def accumulate(
        frozen: Parameters, parameters: Parameters, sums: StepSums, batch: Rows
    ) -> tuple[StepSums, jax.Array]:
        def loss_of_own_rows(parameters: Parameters, token_weights_bt: jax.Array) -> jax.Array:
            model = nnx.merge(graph, replace_parameters(template, {**frozen, **parameters}))
            return weighted_cross_entropy(
                model(batch.tokens_bt, batch.segment_ids_bt, split),
                split.head(head, model.head_weight(), model.dtype),
                batch.targets_bt,
                token_weights_bt,
                vocab_chunk=vocab_chunk,
                axis_name=split.vocabulary_axis(head),
            )

        # The loss is linear in the token weights: its derivative by them is the cross-entropy of every token.
        loss_and_gradients = jax.value_and_grad(loss_of_own_rows, argnums=(0, 1))
        loss, (gradients, cross_entropy_bt) = loss_and_gradients(parameters, batch.token_weights_bt)
        gradients = split.total_gradients(gradients)
        sums = StepSums(jax.tree.map(jnp.add, sums.gradients, gradients), sums.loss + lax.psum(loss, DATA))
        return sums, lax.all_gather(cross_entropy_bt, DATA, tiled=True)

    whole: Any = PartitionSpec()
    sums_specs = StepSums(specs, whole)
    sharded = jax.shard_map(
        accumulate,
        mesh=mesh,
        in_specs=(frozen_specs, specs, sums_specs, PartitionSpec(DATA)),
        out_specs=(sums_specs, whole),
        check_vma=False,  # kernels do not say over which axes their results vary; transposes are written down
    )
    sums_shardings = jax.tree.map(lambda value: value.sharding, abstract_sums(student, mesh))
    return jax.jit(sharded, out_shardings=(sums_shardings, replicated(mesh)), donate_argnums=2)


def _jitted_apply(student: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh) -> jax.stages.Wrapped:
    """(state, sums) -> what the step leaves behind. Elementwise, but for the norm of the gradient."""
    shardings = state_shardings(student, optimizer, mesh)
    whole: Any = replicated(mesh)
    sums_shardings = StepSums(shardings.parameters, whole)

    def apply(state: TrainState, sums: StepSums) -> Applied:
        grad_norm = optax.global_norm(sums.gradients)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums.loss)
        updates, optimizer_state = optimizer.update(sums.gradients, state.optimizer_state, state.parameters)
        updated = TrainState(optax.apply_updates(state.parameters, updates), optimizer_state)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        return Applied(state, jax.tree.map(jnp.zeros_like, sums), grad_norm, finite)

    return jax.jit(apply, out_shardings=Applied(shardings, sums_shardings, whole, whole), donate_argnums=(0, 1))


def state_shardings(student: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The sharding of every array of the training state: moments lie as their parameters do, counters everywhere."""
    shapes = abstract_parameters(student)
    parameters: Any = {name: parameter_sharding(name, value.shape, mesh) for name, value in shapes.items()}

    def as_parameter(_: jax.ShapeDtypeStruct, sharding: NamedSharding) -> NamedSharding:
        return sharding

    optimizer_state = optax.tree_map_params(
        optimizer,
        as_parameter,
        jax.eval_shape(optimizer.init, shapes),
        parameters,
        transform_non_params=lambda _: replicated(mesh),
    )
    return TrainState(parameters, optimizer_state)


def abstract_state(student: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the training state, without allocating it."""
    parameters: Any = abstract_parameters(student)
    shapes = TrainState(parameters, jax.eval_shape(optimizer.init, parameters))
    shardings = state_shardings(student, optimizer, mesh)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)


def initial_state(student: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """float32 copies of the student's trained parameters, and fresh moments. The student keeps its own buffers."""
    shardings = state_shardings(student, optimizer, mesh)
    parameters = {
        name: jnp.array(jax.device_put(value, shardings.parameters[name]), jnp.float32, copy=True)
        for name, value in flatten_parameters(nnx.state(student, nnx.Param)).items()
        if is_trained(name, student)
    }
    optimizer_state = jax.jit(optimizer.init, out_shardings=shardings.optimizer_state)(parameters)
    return TrainState(parameters, optimizer_state)


def abstract_sums(student: Decoder, mesh: Mesh) -> StepSums:
    """Shapes and shardings of the sums, without allocating them."""
    gradients: Any = _on_mesh(abstract_parameters(student), mesh)
    loss: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    return StepSums(gradients, loss)


def zero_sums(parameters: Parameters, mesh: Mesh) -> StepSums:
    shardings: Any = {name: value.sharding for name, value in parameters.items()}
    zeros = jax.jit(
        lambda tree: StepSums(jax.tree.map(jnp.zeros_like, tree), jnp.zeros((), jnp.float32)),
        out_shardings=StepSums(shardings, replicated(mesh)),  # type: ignore[arg-type]
    )
    sums: StepSums = zeros(parameters)
    return sums


def put_rows(micro_batch: MicroBatch, mesh: Mesh) -> Rows:
    """Cut over `data`. Where the mesh spans several processes, each passes the same rows."""
    segment_ids_bt = micro_batch.segment_ids_bt
    return Rows(
        split_rows(micro_batch.tokens_bt, mesh),
        split_rows(micro_batch.targets_bt, mesh),
        split_rows(micro_batch.token_weights_bt, mesh),
        None if segment_ids_bt is None else split_rows(segment_ids_bt, mesh),
    )


def trained_student(
    student: Decoder, parameters: Parameters, frozen: Mapping[str, jax.Array] = NOTHING_FROZEN
) -> Decoder:
    """A decoder like `student` that holds `parameters` and, where these are not all, `frozen`."""
    graph, template = _split_abstract(student)
    return nnx.merge(graph, replace_parameters(template, {**frozen, **parameters}))


def _check_remat(remat: str, mesh: Mesh) -> None:
    platform = mesh.devices.flat[0].platform
    if remat == "offload" and platform == "cpu":
        raise ConfigError(
            "config.finetune.remat: 'offload' moves layer inputs from the device to its host, and a CPU is its own "
            "host; use 'block'"
        )


def _on_mesh(shapes: dict[str, jax.ShapeDtypeStruct], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=parameter_sharding(name, value.shape, mesh))
        for name, value in shapes.items()
    }


def _specs(shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> Any:
    return {name: parameter_spec(name, value.shape, mesh) for name, value in shapes.items()}


def _split_abstract(student: Decoder) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and parameter shapes; holds no buffer of `student` alive."""
    graph, state = nnx.split(student)
    return graph, jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), state)
