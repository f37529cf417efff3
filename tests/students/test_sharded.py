"""A student on a mesh: its layout is read off its arrays, and every layout computes what one device computes."""

import functools
import gc
import weakref
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from lark_jax.config import MeshConfig
from lark_jax.runtime.sharding import DATA, TENSOR, make_mesh, parameter_sharding
from lark_jax.students import Decoder, ShardedStudent, random_student
from lark_jax.students.architecture import architecture_from_config
from lark_jax.students.parameters import abstract_decoder, flatten_parameters, replace_parameters

ARCHITECTURE = architecture_from_config(
    {
        "model_type": "qwen3",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
)
LAYOUTS = {
    "replicated": (8, 1, ()),
    "tensor": (4, 2, (TENSOR,)),
    "gathered": (8, 1, (DATA, TENSOR)),
    "gathered, tensor": (4, 2, (DATA, TENSOR)),
}


@functools.cache
def plain_student() -> Decoder:
    return random_student(ARCHITECTURE, 3, "float32")


def placed(layout: str) -> tuple[Decoder, Mesh]:
    """The student as `load_student` places it."""
    data, tensor, axes = LAYOUTS[layout]
    mesh = make_mesh(MeshConfig(data, tensor))
    graph, state = nnx.split(plain_student())
    values = {
        name: jax.device_put(value, parameter_sharding(name, value.shape, mesh, axes))
        for name, value in flatten_parameters(state).items()
    }
    return nnx.merge(graph, replace_parameters(state, values)), mesh


def logits_program(student: ShardedStudent) -> jax.stages.Wrapped:
    def logits_of_own_rows(parameters: Mapping[str, jax.Array], tokens_bt: jax.Array) -> jax.Array:
        local = student.local(parameters)
        return jnp.einsum("btd,vd->btv", local.decoder(tokens_bt, split=local.split), local.head_vd)

    out = PartitionSpec(DATA, None, TENSOR if TENSOR in student.specs["lm_head.weight"] else None)
    return student.compile(logits_of_own_rows, (student.specs, PartitionSpec(DATA)), out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_is_read_off_the_arrays(layout: str) -> None:
    decoder, mesh = placed(layout)
    student, arrays = ShardedStudent.on_mesh(decoder, mesh)
    assert student.mesh == mesh
    assert list(arrays) == list(student.specs)
    for name, array in flatten_parameters(nnx.state(decoder)).items():
        assert arrays[name] is array, "nothing is copied"
        assert student.specs[name] == array.sharding.spec
    planned = ShardedStudent.abstract(abstract_decoder(ARCHITECTURE), mesh, LAYOUTS[layout][2])
    assert planned.parameters == student.parameters


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_what_one_device_computes(layout: str) -> None:
    tokens_bt = np.random.default_rng().integers(0, ARCHITECTURE.vocab_size, (8, 12), dtype=np.int32)
    student, arrays = ShardedStudent.on_mesh(*placed(layout))
    logits_btv = logits_program(student)(arrays, tokens_bt)
    np.testing.assert_allclose(logits_btv, plain_student().logits(jnp.asarray(tokens_bt)), rtol=1e-4, atol=1e-5)


def test_a_student_that_is_not_on_the_mesh_is_copied_whole_to_every_device() -> None:
    mesh = make_mesh(MeshConfig(4, 2))
    student, arrays = ShardedStudent.on_mesh(plain_student(), mesh)
    assert set(student.specs.values()) == {PartitionSpec()}
    assert all(array.sharding.is_fully_replicated and array.sharding.mesh == mesh for array in arrays.values())


def test_neither_the_student_nor_its_program_keeps_arrays_alive() -> None:
    decoder, mesh = placed("gathered")
    student, arrays = ShardedStudent.on_mesh(decoder, mesh)
    program = logits_program(student)
    program(arrays, np.zeros((8, 4), np.int32))
    held = [weakref.ref(array) for array in arrays.values()]
    del decoder, arrays  # the program and the student live on
    gc.collect()
    assert all(reference() is None for reference in held)


def test_given_parameters_make_a_decoder_and_must_be_complete() -> None:
    values = flatten_parameters(nnx.state(plain_student()))
    student = ShardedStudent.abstract(abstract_decoder(ARCHITECTURE), make_mesh(MeshConfig()))
    found = flatten_parameters(nnx.state(student.with_parameters(values)))
    assert all(found[name] is value for name, value in values.items())
    with pytest.raises(KeyError, match=r"norm\.weight"):
        student.with_parameters({name: value for name, value in values.items() if name != "norm.weight"})


def test_layouts_that_the_decoder_does_not_compute_with_are_refused() -> None:
    student = ShardedStudent.abstract(abstract_decoder(ARCHITECTURE), make_mesh(MeshConfig(4, 2)))
    parameters = dict(student.parameters)
    table = parameters["embed_tokens.weight"]
    for spec in (PartitionSpec(DATA, TENSOR), PartitionSpec((DATA, TENSOR)), PartitionSpec(None, TENSOR)):
        other = jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=NamedSharding(student.mesh, spec))
        with pytest.raises(ValueError, match=r"embed_tokens\.weight: split as"):
            ShardedStudent(student.structure, {**parameters, "embed_tokens.weight": other})
    for elsewhere in (SingleDeviceSharding(jax.devices()[0]), NamedSharding(make_mesh(MeshConfig()), PartitionSpec())):
        other = jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=elsewhere)
        with pytest.raises(ValueError, match="over one mesh"):
            ShardedStudent(student.structure, {**parameters, "embed_tokens.weight": other})
