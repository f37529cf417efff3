import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lark_jax.runtime.sharding import PARAMETER_SPECS
from lark_jax.students import random_student
from lark_jax.students.architecture import architecture_from_config
from lark_jax.students.checkpoint.hf_names import hf_slots
from lark_jax.students.families import FAMILIES
from lark_jax.students.parameters import abstract_decoder, flatten_parameters, parameter_shapes, replace_parameters

MODEL_TYPES = sorted(FAMILIES)


def make_architecture(model_type, **fields):
    sizes = {
        "vocab_size": 31,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": None,
    }
    return architecture_from_config({"model_type": model_type, **sizes, **fields})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_name_matches_exactly_one_row_of_the_sharding_table(model_type, tied):
    for name, shape in parameter_shapes(make_architecture(model_type, tie_word_embeddings=tied)).items():
        matches = [spec for pattern, spec in PARAMETER_SPECS if re.fullmatch(pattern, name)]
        assert len(matches) == 1, name
        assert len(matches[0]) <= len(shape), name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_shapes_are_those_of_real_parameters(model_type):
    architecture = make_architecture(model_type)
    parameters = flatten_parameters(nnx.state(random_student(architecture, 0, "float32"), nnx.Param))
    assert parameter_shapes(architecture) == {name: value.shape for name, value in parameters.items()}


def test_shapes_of_a_large_student_take_no_memory():
    qwen7b = make_architecture(
        "qwen2",
        vocab_size=152_064,
        hidden_size=3_584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=128,
        tie_word_embeddings=False,
    )
    # Qwen2.5-7B's model card: 7.61B parameters.
    assert sum(math.prod(shape) for shape in parameter_shapes(qwen7b).values()) == 7_615_616_512
    leaves = jax.tree.leaves(nnx.state(abstract_decoder(qwen7b)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_replacing_all_parameters_round_trips_and_refuses_other_names():
    state = nnx.state(random_student(make_architecture("qwen3"), 0, "float32"), nnx.Param)
    values = {
        name: jnp.full_like(value, index) for index, (name, value) in enumerate(flatten_parameters(state).items())
    }
    replaced = flatten_parameters(replace_parameters(state, values))
    assert list(replaced) == list(values)
    for name, value in values.items():
        np.testing.assert_array_equal(replaced[name], value)
    with pytest.raises(KeyError, match=r"lm_head\.bias"):
        replace_parameters(state, {**values, "lm_head.bias": jnp.zeros(3)})
    with pytest.raises(KeyError, match=r"norm\.weight"):
        replace_parameters(state, {name: value for name, value in values.items() if name != "norm.weight"})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_hf_names_are_a_bijection_onto_parameter_layers(model_type, tied):
    architecture = make_architecture(model_type, tie_word_embeddings=tied)
    slots = hf_slots(architecture)
    targets = {(slot.name, slot.layer) for slot in slots.values()}
    assert len(targets) == len(slots)
    expected = {
        (name, layer)
        for name, shape in parameter_shapes(architecture).items()
        for layer in (range(shape[0]) if name.startswith("layers.") else [None])
    }
    assert targets == expected
