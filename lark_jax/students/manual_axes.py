"""Kernels inside `shard_map`: which mesh axes a value varies over is part of its type, and kernels do not say it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.sharding import PartitionSpec


def call_without_axis_types(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, where its outputs may depend on all of `args` and vary over every mesh axis that these do.

    With `check_vma=True`, its default, `shard_map` wants `pallas_call` to name these axes, and JAX's own kernels do
    not. So `function` is traced for arguments that vary over none, and its outputs are marked afterwards. It cannot be
    differentiated, holds no tracers of its caller, and communicates nothing. Outside `shard_map` this is a plain call.

    Args:
      function: pytrees of arrays -> pytree of arrays.
    """
    if not inside_shard_map():
        return function(*args)
    axes = frozenset().union(*map(_varying_axes, jax.tree.leaves(args)))
    whole = PartitionSpec()  # nothing is cut any further

    def fresh(*args: Any) -> Any:
        # An argument handed back as it is would keep its own type, or not: `jit` decides. Copies cost nothing here.
        return jax.tree.map(jnp.copy, function(*args))

    def traced_apart(*args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        jaxpr, out_shapes = jax.make_jaxpr(jax.jit(fresh), return_shape=True)(*shapes)
        return jax.tree.unflatten(jax.tree.structure(out_shapes), jaxpr_as_fun(jaxpr)(*leaves))

    out = jax.shard_map(traced_apart, in_specs=whole, out_specs=whole, check_vma=False)(*args)
    return jax.tree.map(lambda x: _varying_over(axes, x), out)


def inside_shard_map() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _varying_axes(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def _varying_over(axes: frozenset[str], x: jax.Array) -> jax.Array:
    missing = tuple(sorted(axes - _varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
