"""The communication between devices in one step, read off the step's jaxpr.

A step is one `shard_map` in which every collective is explicit, so the jaxpr has all of them, with the trip counts of
the loops around them.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from lark_jax.errors import PreflightError

# In a ring of n devices, each sends this many times (n - 1) / n of the whole (gathered, summed or exchanged) array.
_RING_TRIPS = {"all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "psum": 2, "pmax": 2, "pmin": 2}
_SAME_AS = {
    "all_gather_invariant": "all_gather",
    "psum_invariant": "psum",
    "psum2": "psum",
    "psum_scatter": "reduce_scatter",
}


@dataclass(frozen=True)
class Collective:
    """One kind of communication in a step."""

    kind: str  # the primitive
    axes: str  # mesh axes, joined by a comma
    times: int  # executions per step
    bytes_sent: int  # by each device in all executions, with the devices of the axis in a ring


def collectives_of(jaxpr: ClosedJaxpr, axis_sizes: Mapping[str, int]) -> tuple[Collective, ...]:
    """The collectives of `jaxpr`, summed by kind and axis.

    Args:
      axis_sizes: devices along each mesh axis.

    Raises:
      PreflightError: a collective is inside a loop with an unknown trip count.
    """
    times: collections.Counter[tuple[str, str]] = collections.Counter()
    sent: collections.Counter[tuple[str, str]] = collections.Counter()
    for equation, repeats in _equations(jaxpr.jaxpr, 1):
        kind = _SAME_AS.get(equation.primitive.name, equation.primitive.name)
        axes = _axes_of(equation)
        devices = 1
        for axis in axes:
            devices *= axis_sizes[axis]
        if devices > 1:
            whole = max(_bytes_of(equation.invars), _bytes_of(equation.outvars))
            times[kind, ",".join(axes)] += repeats
            sent[kind, ",".join(axes)] += repeats * _RING_TRIPS[kind] * whole * (devices - 1) // devices
    return tuple(Collective(kind, axes, times[kind, axes], sent[kind, axes]) for kind, axes in sorted(times))


def _equations(jaxpr: Jaxpr, repeats: int) -> Iterator[tuple[JaxprEqn, int]]:
    """Collectives with the number of their executions; all branches of a `cond` count."""
    for equation in jaxpr.eqns:
        name = _SAME_AS.get(equation.primitive.name, equation.primitive.name)
        if name in _RING_TRIPS:
            yield equation, repeats
            continue
        inner = repeats * equation.params["length"] if equation.primitive.name == "scan" else repeats
        for sub_jaxpr in _sub_jaxprs(equation.params.values()):
            found = list(_equations(sub_jaxpr, inner))
            if found and equation.primitive.name == "while":
                raise PreflightError("the step has a collective inside a while loop, whose trip count is unknown")
            yield from found


def _sub_jaxprs(values: Any) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _sub_jaxprs(value)


def _axes_of(equation: JaxprEqn) -> tuple[str, ...]:
    params = equation.params
    axes = params["axis_name"] if "axis_name" in params else params["axes"]
    return tuple(axes) if isinstance(axes, tuple | list) else (axes,)


def _bytes_of(variables: Sequence[Any]) -> int:
    return sum(variable.aval.size * variable.aval.dtype.itemsize for variable in variables)
