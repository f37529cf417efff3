"""A student whose parameters are spread over a mesh, and programs that run it there.

Where each device has which part of a parameter is decided once, where the parameters are placed (`load_student`,
`layout.choose_parameter_axes`). Everything else reads it off their shardings.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lark_jax.errors import ConfigError
from lark_jax.runtime.sharding import DATA, TENSOR, parameter_sharding, replicated, table_spec
from lark_jax.students.architecture import Architecture
from lark_jax.students.decoder import Decoder
from lark_jax.students.parallel import ParameterSplit
from lark_jax.students.parameters import abstract_parameters, flatten_parameters, replace_parameters


@dataclasses.dataclass(frozen=True)
class LocalStudent:
    """A student inside a `shard_map`: a decoder with one device's parts of the parameters, and how they are split."""

    decoder: Decoder
    split: ParameterSplit

    @property
    def head_vd(self) -> jax.Array:
        """This device's rows of the output projection, with all their columns."""
        return self.split.head(self.decoder.head_name, self.decoder.head_weight(), self.decoder.dtype)

    @property
    def vocabulary_axis(self) -> str | None:
        """The mesh axis over which rows of the output projection are split."""
        return self.split.vocabulary_axis(self.decoder.head_name)


@dataclasses.dataclass(frozen=True)
class ShardedStudent:
    """The structure of a decoder, and the layout of its parameters on a mesh. Holds no array.

    Raises:
      ConfigError: the mesh does not fit the student, see `check_tensor_axis`.
      ValueError: the parameters are not on one mesh, or one is split in a way that the decoder does not compute with.
    """

    structure: Decoder  # with `jax.ShapeDtypeStruct`s in place of arrays
    parameters: Mapping[str, jax.ShapeDtypeStruct]  # by dotted name, with shardings over one mesh

    def __post_init__(self) -> None:
        meshes = {getattr(parameter.sharding, "mesh", None) for parameter in self.parameters.values()}
        if len(meshes) != 1 or None in meshes:
            raise ValueError("the parameters of a student must have a NamedSharding over one mesh; see `on_mesh`")
        for name, spec in self.specs.items():
            _check_spec(name, spec)
        check_tensor_axis(self.structure.architecture, self.mesh)

    @classmethod
    def on_mesh(cls, student: Decoder, mesh: Mesh) -> "tuple[ShardedStudent, dict[str, jax.Array]]":
        """`student`, and its arrays by name: those on `mesh` as they are, copies of others, whole on every device."""

        def placed(value: jax.Array) -> jax.Array:
            is_on_mesh = isinstance(value.sharding, NamedSharding) and value.sharding.mesh == mesh
            return value if is_on_mesh else jax.device_put(value, replicated(mesh))

        arrays = {name: placed(value) for name, value in flatten_parameters(nnx.state(student, nnx.Param)).items()}
        layout = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
            for name, array in arrays.items()
        }
        return cls(_without_arrays(student), layout), arrays

    @classmethod
    def abstract(cls, student: Decoder, mesh: Mesh, axes: Sequence[str] = (DATA, TENSOR)) -> "ShardedStudent":
        """`student` as `load_student` places it: `sharding.PARAMETER_SPECS` over `axes`; devices may be absent."""
        parameters = {
            name: jax.ShapeDtypeStruct(
                value.shape, value.dtype, sharding=parameter_sharding(name, value.shape, mesh, axes)
            )
            for name, value in abstract_parameters(student).items()
        }
        return cls(_without_arrays(student), parameters)

    @functools.cached_property
    def mesh(self) -> Mesh:
        sharding: Any = next(iter(self.parameters.values())).sharding
        return sharding.mesh

    @functools.cached_property
    def specs(self) -> dict[str, PartitionSpec]:
        """PartitionSpec of every parameter, as `shard_map` takes it."""
        shardings: dict[str, Any] = {name: parameter.sharding for name, parameter in self.parameters.items()}
        return {name: sharding.spec for name, sharding in shardings.items()}

    @functools.cached_property
    def split(self) -> ParameterSplit:
        return ParameterSplit(self.specs)

    def with_parameters(self, parameters: Mapping[str, jax.Array]) -> Decoder:
        """The decoder with these parameters: all of them, of any dtype."""
        graph, state = nnx.split(self.structure)
        return nnx.merge(graph, replace_parameters(state, parameters))

    def local(self, parameters: Mapping[str, jax.Array]) -> LocalStudent:
        """Inside a function that is compiled by `compile`: the student with this device's parts of its parameters."""
        return LocalStudent(self.with_parameters(parameters), self.split)

    def compile(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any, **jit_options: Any
    ) -> jax.stages.Wrapped:
        """`function` as a program that every device of the mesh runs on its own parts of the arguments.

        It is compiled once for every shape of its arguments. Parameters are arguments, with `specs`; `function` turns
        them into a student with `local`. Collectives are explicit. Specs are those of `jax.shard_map`.
        """
        # check_vma: attention kernels do not say over which axes their results vary.
        sharded = jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return jax.jit(sharded, **jit_options)


def check_tensor_axis(architecture: Architecture, mesh: Mesh) -> None:
    """Raises ConfigError, which names the sizes that work, if the `tensor` axis of `mesh` would cut attention heads."""
    heads, devices = architecture.num_kv_heads, mesh.shape[TENSOR]
    if heads % devices:
        divisors = ", ".join(str(divisor) for divisor in range(1, heads + 1) if heads % divisor == 0)
        raise ConfigError(
            f"config.mesh.tensor: expected a divisor of the student's {heads} key-value heads ({divisors}), "
            f"got {devices}"
        )


def _check_spec(name: str, spec: PartitionSpec) -> None:
    table = table_spec(name)
    if any(axis not in (None, expected) for axis, expected in zip_longest(spec, table)):
        raise ValueError(f"{name}: split as {spec}; the decoder computes with {table}, or part of it")


def _without_arrays(student: Decoder) -> Decoder:
    graph, state = nnx.split(student)
    return nnx.merge(graph, jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), state))
