"""Which parameters of a student are trained: all of them or, where it has an adapter, those of the adapter.

Both sets are dictionaries by dotted name and together they are the student. Trained parameters are float32 masters;
frozen ones have the dtype of the computation and neither gradients nor moments.
"""

import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lark_jax.config import FinetuneConfig
from lark_jax.finetuning.optimizer import Parameters
from lark_jax.runtime.sharding import parameter_sharding
from lark_jax.students.decoder import Decoder
from lark_jax.students.lora import Lora, is_factor
from lark_jax.students.parameters import flatten_parameters, shapes_of

NOTHING_FROZEN: Mapping[str, jax.Array] = types.MappingProxyType({})


def lora_of(config: FinetuneConfig) -> Lora | None:
    """The adapter that is trained; None: every parameter is."""
    return Lora(config.lora_rank, config.lora_alpha, config.lora_targets) if config.lora_rank > 0 else None


def is_trained(name: str, student: Decoder) -> bool:
    return student.lora is None or is_factor(name)


def abstract_parameters(student: Decoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted name -> shape of every float32 master parameter."""
    shapes = shapes_of(student)
    return {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in shapes.items() if is_trained(n, student)}


def abstract_frozen(student: Decoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted name -> shape of every parameter that is not trained."""
    shapes = shapes_of(student)
    return {n: jax.ShapeDtypeStruct(shape, student.dtype) for n, shape in shapes.items() if not is_trained(n, student)}


def frozen_parameters(student: Decoder, dtype: jnp.dtype, mesh: Mesh) -> Parameters:
    """Those of `student` that are not trained, in `dtype` and laid out over `mesh`; no copies where they are so."""
    parameters = flatten_parameters(nnx.state(student, nnx.Param))
    return {
        name: jax.device_put(value.astype(dtype), parameter_sharding(name, value.shape, mesh))
        for name, value in parameters.items()
        if not is_trained(name, student)
    }
