"""Flat dotted parameter names <-> NNX state; decoders with random weights, and with shapes in place of arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lark_jax.students.architecture import Architecture
from lark_jax.students.decoder import Decoder


def flatten_parameters(state: nnx.State) -> dict[str, jax.Array]:
    """Dotted name (as `sharding.PARAMETER_SPECS` spells it) -> array, sorted by name."""
    flat = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(state)}
    return {
        name: flat[name].get_value() if isinstance(flat[name], nnx.Variable) else flat[name] for name in sorted(flat)
    }


def replace_parameters(state: nnx.State, values: Mapping[str, jax.Array]) -> nnx.State:
    """A copy of `state` with every parameter taken from `values`; KeyError if the names differ."""
    flat = nnx.to_flat_state(state)
    names = {".".join(map(str, path)) for path, _ in flat}
    if names != set(values):
        raise KeyError(f"parameters differ: {sorted(names ^ set(values))}")
    pairs = [(path, variable.replace(values[".".join(map(str, path))])) for path, variable in flat]
    return nnx.from_flat_state(pairs)


def abstract_decoder(
    architecture: Architecture, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32, **options: Any
) -> Decoder:
    """A decoder with `jax.ShapeDtypeStruct`s for parameters; takes no memory."""
    return nnx.eval_shape(lambda: Decoder(architecture, dtype, param_dtype, rngs=nnx.Rngs(0), **options))


def random_student(architecture: Architecture, seed: int, dtype: DTypeLike) -> Decoder:
    """A decoder with fresh weights, parameters and computation in `dtype`; equal seeds give equal weights."""
    dtype = jnp.dtype(dtype)
    return nnx.jit(lambda: Decoder(architecture, dtype, dtype, rngs=nnx.Rngs(seed)))()


def abstract_parameters(student: Decoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted name -> shape and dtype of every parameter, those of an adapter included, sorted by name."""
    flat = nnx.to_flat_state(nnx.state(student, nnx.Param))
    return dict(sorted((".".join(map(str, path)), jax.ShapeDtypeStruct(v.shape, v.dtype)) for path, v in flat))


def shapes_of(student: Decoder) -> dict[str, tuple[int, ...]]:
    """Dotted name -> shape of every parameter, those of an adapter included, sorted by name."""
    return {name: value.shape for name, value in abstract_parameters(student).items()}


def parameter_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Dotted name -> shape of every parameter of a checkpoint, layers stacked on the leading axis."""
    return shapes_of(abstract_decoder(architecture))
