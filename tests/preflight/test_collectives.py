"""Bytes between devices, counted in jaxprs, against what the collectives must carry."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec
from student_shapes import STUDENT_SHAPES

from lark_jax.errors import PreflightError
from lark_jax.preflight.collectives import Collective, collectives_of
from lark_jax.runtime.sharding import DATA, TENSOR
from lark_jax.scoring.step import trace_score_step
from lark_jax.students.architecture import architecture_from_config
from lark_jax.students.parameters import abstract_decoder, parameter_shapes
from lark_jax.students.sharded import ShardedStudent

LAYERS = 5


def mesh_of(data: int, tensor: int) -> Mesh:
    devices = jax.devices()[: data * tensor]
    return jax.make_mesh((data, tensor), (DATA, TENSOR), axis_types=(AxisType.Auto,) * 2, devices=devices)


def test_a_collective_inside_a_scan_counts_once_per_trip() -> None:
    def step(x: jax.Array) -> jax.Array:
        def layer(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            whole = lax.all_gather(carry, DATA, axis=0, tiled=True)
            return carry + lax.psum(whole.sum(axis=0, keepdims=True), TENSOR), None

        return lax.scan(layer, x, None, length=LAYERS)[0]

    mesh = mesh_of(4, 2)
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=PartitionSpec(DATA), out_specs=PartitionSpec(DATA), check_vma=False
    )
    found = collectives_of(jax.make_jaxpr(sharded)(jnp.zeros((4, 6), jnp.bfloat16)), mesh.shape)
    # Gathered: [4, 6] in bfloat16, of which each device sends its quarter three times. Summed: [1, 6] over two devices.
    assert found == (
        Collective("all_gather", DATA, LAYERS, LAYERS * 4 * 6 * 2 * 3 // 4),
        Collective("psum", TENSOR, LAYERS, LAYERS * 6 * 2 * 2 // 2),
    )


def test_axes_of_one_device_cost_nothing() -> None:
    mesh = mesh_of(1, 1)
    sharded = jax.shard_map(
        lambda x: lax.psum(x, DATA), mesh=mesh, in_specs=PartitionSpec(DATA), out_specs=PartitionSpec(), check_vma=False
    )
    assert collectives_of(jax.make_jaxpr(sharded)(jnp.zeros((4,))), mesh.shape) == ()


def test_a_collective_in_a_loop_of_unknown_length_is_refused() -> None:
    mesh = mesh_of(8, 1)

    def step(x: jax.Array) -> jax.Array:
        return lax.while_loop(lambda y: y.sum() < 9, lambda y: lax.psum(y, DATA), x)

    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=PartitionSpec(DATA), out_specs=PartitionSpec(DATA), check_vma=False
    )
    with pytest.raises(PreflightError, match="while"):
        collectives_of(jax.make_jaxpr(sharded)(jnp.zeros((8,))), mesh.shape)


def traced_bytes(axes: tuple[str, ...], data: int, tensor: int, length: int) -> dict[str, int]:
    mesh = mesh_of(data, tensor)
    architecture = architecture_from_config(STUDENT_SHAPES["tiny"])
    structure = abstract_decoder(architecture, jnp.bfloat16, jnp.bfloat16, attention_backend="blockwise")
    student = ShardedStudent.abstract(structure, mesh, axes)
    traced = trace_score_step(student, vocab_chunk=128, rows=data, length=length)
    return {item.kind: item.bytes_sent for item in collectives_of(traced.jaxpr, mesh.shape)}


def test_replicated_parameters_need_a_few_numbers_per_row() -> None:
    assert sum(traced_bytes((), 8, 1, 256).values()) < 1_000


def test_gathered_parameters_travel_once_per_step() -> None:
    """Every matrix of every layer, and the tied head, less the share that each device has already."""
    shapes = parameter_shapes(architecture_from_config(STUDENT_SHAPES["tiny"]))
    matrices = [
        shape for name, shape in shapes.items() if name.endswith("proj.weight") or name == "embed_tokens.weight"
    ]
    values = sum(layers * rows * columns for layers, rows, columns in ((1, *s)[-3:] for s in matrices))
    sent = traced_bytes((DATA,), 8, 1, 256)["all_gather"]
    assert sent == pytest.approx(2 * values * 7 / 8, rel=0.01)


def test_split_layers_add_up_activations_for_every_token() -> None:
    """Two sums per layer and one for the embedding: [rows, length, hidden] each; the statistics are small."""
    architecture = architecture_from_config(STUDENT_SHAPES["tiny"])
    short, long = (traced_bytes((TENSOR,), 4, 2, length)["psum"] for length in (256, 512))
    sums = 2 * architecture.num_layers + 1
    assert long - short == pytest.approx(2 * sums * 256 * architecture.hidden_size * 2 // 2, rel=0.05)
