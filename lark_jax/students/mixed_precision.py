"""Products with master weights: computed in the dtype of the activations, gradients of the weights summed in float32.

Casting a weight and leaving the rest to autodiff would round its gradient to the compute dtype on every device before
it is summed over devices. Here a gradient is float32 from its first sum over tokens on.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lark_jax.students.attention.contract import matmul_precision


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x W' in the dtype of `x`: [..., in] and W [out, in], of any float dtype, to [..., out]."""
    return _project(x, _varying_as(x, weight), weight.dtype)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + b in the dtype of `x`: [..., d] and [d]. Broadcast, then cast: the gradient is cast, then summed."""
    spread = jnp.broadcast_to(jnp.expand_dims(_varying_as(x, bias), range(x.ndim - 1)), x.shape)
    return x + spread.astype(x.dtype)


def scale(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x * w in the dtype of `x`: [..., d] and [d]."""
    return _scale(x, _varying_as(x, weight))


_Operands = tuple[jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x: jax.Array, weight: jax.Array, weight_dtype: jnp.dtype) -> jax.Array:
    return _project_forward(x, weight, weight_dtype)[0]


def _project_forward(x: jax.Array, weight: jax.Array, weight_dtype: jnp.dtype) -> tuple[jax.Array, _Operands]:
    """The residuals hold the cast weight: under FSDP a second cast would be a second gather in the backward pass."""
    del weight_dtype
    weight = weight.astype(x.dtype)
    return _contract("...i,oi->...o", x, weight), (x, weight)


def _project_backward(weight_dtype: jnp.dtype, operands: _Operands, d_out: jax.Array) -> _Operands:
    x, weight = operands
    tokens = tuple(range(x.ndim - 1))
    d_weight = lax.dot_general(
        d_out, x, ((tokens, tokens), ((), ())), precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32
    )
    return _contract("...o,oi->...i", d_out, weight), d_weight.astype(weight_dtype)


_project.defvjp(_project_forward, _project_backward)


def _contract(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """The product in the dtype of `x`; sums are float32 on every platform.

    XLA's CPU backend is two to three times faster at bfloat16 products with a float32 result (384 against 146 GFLOP/s
    on two cores). Accelerators round the result at no cost.
    """
    multiply = functools.partial(jnp.einsum, subscripts, precision=matmul_precision(x.dtype))

    def through_float32(x: jax.Array, weight: jax.Array) -> jax.Array:
        return multiply(x, weight, preferred_element_type=jnp.float32).astype(x.dtype)

    return lax.platform_dependent(x, weight, cpu=through_float32, default=multiply)


@jax.custom_vjp
def _scale(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.expand_dims(weight.astype(x.dtype), range(x.ndim - 1)) * x


def _scale_forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, _Operands]:
    return _scale(x, weight), (x, weight)


def _scale_backward(operands: _Operands, d_out: jax.Array) -> _Operands:
    x, weight = operands
    d_weight = jnp.sum(d_out.astype(jnp.float32) * x.astype(jnp.float32), axis=range(x.ndim - 1))
    return _scale(d_out, weight), d_weight.astype(weight.dtype)


_scale.defvjp(_scale_forward, _scale_backward)


def _varying_as(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Inside `shard_map`, a weight that all devices share; the transpose sums its gradient over them, in its dtype."""
    x_axes, weight_axes = (jax.typeof(array).manual_axis_type.varying for array in (x, weight))
    axes = tuple(sorted(x_axes - weight_axes))
    return lax.pcast(weight, axes, to="varying") if axes else weight
