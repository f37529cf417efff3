"""Which parameters of a student are trained: all of them or, if it has an adapter, those of the adapter.

Both sets are dictionaries by dotted name and together they are the student. Trained parameters are float32 masters;
frozen ones have the compute dtype and neither gradients nor moments.
"""

import types
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lark_jax.config import FinetuneConfig
from lark_jax.finetuning.optimizer import Parameters
from lark_jax.students.decoder import Decoder
from lark_jax.students.lora import Lora, is_factor
from lark_jax.students.parameters import flatten_parameters
from lark_jax.students.sharded import ShardedStudent

NOTHING_FROZEN: Mapping[str, jax.Array] = types.MappingProxyType({})


def lora_of(config: FinetuneConfig) -> Lora | None:
    """The adapter to train; None: all parameters are trained."""
    return Lora(config.lora_rank, config.lora_alpha, config.lora_targets) if config.lora_rank > 0 else None


def abstract_trained(student: ShardedStudent) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted name -> shape and sharding of every float32 master parameter."""
    return _on_mesh(student, [name for name in student.specs if _is_trained(name, student)], jnp.float32)


def abstract_frozen(student: ShardedStudent) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted name -> shape and sharding of every parameter that is not trained, in the compute dtype."""
    frozen = [name for name in student.specs if not _is_trained(name, student)]
    return _on_mesh(student, frozen, student.structure.dtype)


def frozen_parameters(start: Decoder, student: ShardedStudent) -> Parameters:
    """The frozen parameters of `start`, laid out as `student`'s; copied only where dtype or layout differ."""
    values = flatten_parameters(nnx.state(start, nnx.Param))
    return {
        name: jax.device_put(values[name].astype(frozen.dtype), frozen.sharding)
        for name, frozen in abstract_frozen(student).items()
    }


def _is_trained(name: str, student: ShardedStudent) -> bool:
    return student.structure.lora is None or is_factor(name)


def _on_mesh(student: ShardedStudent, names: Sequence[str], dtype: DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
    parameters = student.parameters
    return {
        name: jax.ShapeDtypeStruct(parameters[name].shape, dtype, sharding=parameters[name].sharding) for name in names
    }
