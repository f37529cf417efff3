"""The cost of training an adapter: gradients of frozen weights are neither computed nor sent nor kept."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr
from tiny_run import ARCHITECTURE, CONFIG
from twenty_training_steps import LENGTH, mesh_of

from lark_jax.config import LORA_TARGETS
from lark_jax.finetuning.optimizer import make_optimizer
from lark_jax.finetuning.parameter_sets import abstract_frozen, abstract_trained
from lark_jax.finetuning.step import abstract_state, trace_accumulate
from lark_jax.preflight.collectives import collectives_of
from lark_jax.students.lora import Lora, is_factor
from lark_jax.students.parameters import abstract_decoder, abstract_parameters, parameter_shapes
from lark_jax.students.sharded import ShardedStudent

LAYERS = 5
DEEP = dataclasses.replace(ARCHITECTURE, num_layers=LAYERS)


def traced(lora: Lora | None, *, data: int = 1, dtype: str = "float32", **changes: int) -> jax.stages.Traced:
    architecture = dataclasses.replace(DEEP, **changes)
    structure = abstract_decoder(architecture, dtype, remat="block", attention_backend="blockwise", lora=lora)
    student = ShardedStudent.abstract(structure, mesh_of(data, 1))
    return trace_accumulate(student, vocab_chunk=512, rows=data, length=LENGTH)


def test_the_two_sets_are_the_student_and_only_the_adapter_has_moments() -> None:
    student = ShardedStudent.abstract(
        abstract_decoder(DEEP, "bfloat16", lora=Lora(8, 16.0, LORA_TARGETS)), mesh_of(8, 1)
    )
    trained, frozen = abstract_trained(student), abstract_frozen(student)
    assert {name: value.shape for name, value in frozen.items()} == parameter_shapes(DEEP)
    assert {value.dtype for value in frozen.values()} == {jnp.dtype("bfloat16")}
    assert len(trained) == 2 * len(LORA_TARGETS)
    assert all(is_factor(name) and value.dtype == jnp.float32 for name, value in trained.items())
    state = abstract_state(student, make_optimizer(CONFIG, 10))
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.shape]
    assert sum(leaf.size for leaf in arrays) == 3 * sum(value.size for value in trained.values())


def test_gradients_of_the_adapter_are_all_that_is_reduced() -> None:
    lora = Lora(8, 16.0, LORA_TARGETS)
    program, mesh = traced(lora, data=8, dtype="bfloat16"), mesh_of(8, 1)
    sent: dict[str, int] = {}
    for item in collectives_of(program.jaxpr, mesh.shape):
        sent[item.kind] = sent.get(item.kind, 0) + item.bytes_sent
    sizes = {name: value.size for name, value in abstract_parameters(abstract_decoder(DEEP, lora=lora)).items()}
    factors = sum(size for name, size in sizes.items() if is_factor(name))
    # Rank 8 and widths of 32 and 48 are cut in eight: every gradient leaves its layer by a reduce_scatter.
    assert sent["reduce_scatter"] == pytest.approx(4 * factors * 7 / 8)
    frozen = sum(size for name, size in sizes.items() if name.endswith("proj.weight"))
    head, tokens = ARCHITECTURE.vocab_size * ARCHITECTURE.hidden_size, 8 * LENGTH * 4
    # Gathered forward and once more in the recomputation, as bfloat16; the head once; tokens in and losses out.
    assert sent["all_gather"] == pytest.approx((2 * 2 * (frozen + factors) + 2 * head + 2 * tokens) * 7 / 8, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_keeps_its_input_and_no_copy_of_its_weights(dtype: str) -> None:
    jaxpr: ClosedJaxpr = traced(Lora(8, 16.0, LORA_TARGETS), data=8, dtype=dtype).jaxpr
    (sharded,) = (e for e in jaxpr.jaxpr.eqns if e.primitive.name == "shard_map")
    scans = [e for e in sharded.params["jaxpr"].eqns if e.primitive.name == "scan" and e.params["length"] == LAYERS]
    kept = [variable.aval.shape[1:] for variable in scans[0].outvars if variable.aval.shape[:1] == (LAYERS,)]
    assert kept == [(1, LENGTH, ARCHITECTURE.hidden_size)]


def test_no_gradient_of_a_frozen_weight_is_computed_or_held() -> None:
    """With a vocabulary that outweighs everything else. A loop body counts once in the FLOPs: 512 rows of the head."""
    vocab, chunk = 16_384, 512
    whole, adapter = (traced(lora, vocab_size=vocab).lower().compile() for lora in (None, Lora(1, 1.0, LORA_TARGETS)))
    flops = [program.cost_analysis()["flops"] for program in (whole, adapter)]
    assert flops[0] - flops[1] >= 2 * LENGTH * chunk * ARCHITECTURE.hidden_size  # the product d_head = d_logits' hidden
    head_bytes = 4 * vocab * ARCHITECTURE.hidden_size
    assert whole.memory_analysis().temp_size_in_bytes > head_bytes
    assert adapter.memory_analysis().temp_size_in_bytes < head_bytes / 2
