"""Values as if the weight were cast first; gradients of the weight as float64 gives them, not rounded to bfloat16."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from lark_jax.students.mixed_precision import add_bias, project, scale

Op = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Case:
    op: Op
    plain: Op  # the same with a weight that has been cast
    weight_shape: tuple[int, ...]
    weight_gradient: Callable[[np.ndarray, np.ndarray], np.ndarray]  # of x and d_out


CASES = {
    "project": Case(
        project,
        lambda x, weight: jnp.einsum("bti,oi->bto", x, weight, precision="highest"),
        (5, 12),
        lambda x, d_out: np.einsum("bto,bti->oi", d_out, x),
    ),
    "scale": Case(
        scale, lambda x, weight: x * weight[None, None], (12,), lambda x, d_out: np.einsum("btd,btd->d", d_out, x)
    ),
    "add_bias": Case(
        add_bias, lambda x, weight: x + weight[None, None], (12,), lambda _, d_out: d_out.sum(axis=(0, 1))
    ),
}
each_op = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def operands(case: Case, dtype: str, weight_dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [8, 7, 12], a weight and a cotangent of the result."""
    rng = np.random.default_rng()
    x = jnp.asarray(rng.normal(size=(8, 7, 12)), dtype)
    weight = jnp.asarray(rng.normal(size=case.weight_shape), weight_dtype)
    out = jax.eval_shape(case.op, x, weight)
    return x, weight, jnp.asarray(rng.normal(size=out.shape), out.dtype)


def gradients(op: Op, x: jax.Array, weight: jax.Array, d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.jit(lambda x, weight, d_out: jax.vjp(op, x, weight)[1](d_out))(x, weight, d_out)


@each_op
@each_dtype
def test_values_and_gradient_of_x_are_those_of_the_cast_weight(case: Case, dtype: str) -> None:
    x, weight, d_out = operands(case, dtype)
    cast = weight.astype(dtype)
    actual = jax.jit(case.op)(x, weight)
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, jax.jit(case.plain)(x, cast))
    d_x, expected_d_x = gradients(case.op, x, weight, d_out)[0], gradients(case.plain, x, cast, d_out)[0]
    assert d_x.dtype == dtype
    tolerance = 1e-6 if dtype == "float32" else 2**-7
    np.testing.assert_allclose(*(np.asarray(a, np.float64) for a in (d_x, expected_d_x)), rtol=tolerance, atol=1e-6)


@each_op
@each_dtype
def test_gradient_of_a_float32_weight_has_float32_digits(case: Case, dtype: str) -> None:
    x, weight, d_out = operands(case, dtype)
    _, d_weight = gradients(case.op, x, weight, d_out)
    expected = case.weight_gradient(np.asarray(x, np.float64), np.asarray(d_out, np.float64))
    assert d_weight.dtype == jnp.float32
    np.testing.assert_allclose(d_weight, expected, rtol=1e-5, atol=1e-5)


@each_op
def test_a_bfloat16_weight_has_a_bfloat16_gradient(case: Case) -> None:
    x, weight, d_out = operands(case, "bfloat16", "bfloat16")
    assert [gradient.dtype for gradient in gradients(case.op, x, weight, d_out)] == [jnp.bfloat16] * 2


@each_op
def test_gradients_in_shard_map_are_those_of_one_device(case: Case) -> None:
    x, weight, d_out = operands(case, "bfloat16")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(case.op, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    inside = jax.shard_map(
        lambda x, weight, d_out: jax.vjp(case.op, x, weight)[1](d_out),
        mesh=mesh,
        in_specs=(rows, whole, rows),
        out_specs=(rows, whole),
    )
    expected_d_x, expected_d_weight = gradients(case.op, x, weight, d_out)
    for d_x, d_weight in (gradients(mapped, x, weight, d_out), jax.jit(inside)(x, weight, d_out)):
        np.testing.assert_array_equal(d_x, expected_d_x)
        assert d_weight.dtype == jnp.float32
        np.testing.assert_allclose(d_weight, expected_d_weight, rtol=1e-5, atol=1e-5)
