"""Our logits against those of transformers on torch, same checkpoint, same tokens."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_families import FAMILIES

from lark_jax.students import families, load_student
from lark_jax.students.architecture import RopeScaling, architecture_from_config
from lark_jax.students.decoder import Decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 600  # long enough that a wrong rotary frequency or scaling shows, and windows of 75 slide
TOLERANCE = 2e-4


def reference_logits(folder, tokens, dtype="float32"):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def random_tokens(architecture, rows=2):
    return np.random.default_rng().integers(0, architecture.vocab_size, (rows, LENGTH))


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_logits_equal_those_of_transformers(family, make_checkpoint):
    folder = make_checkpoint(family)
    student, architecture = load_student(folder, dtype="float32")
    tokens = random_tokens(architecture)
    reference = reference_logits(folder, tokens)
    assert np.abs(reference).max() > 1.0
    logits = np.asarray(student.logits(jnp.asarray(tokens)))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("llama3", {"rope_scaling": RopeScaling()}),
        ("llama-linear", {"rope_scaling": RopeScaling()}),
        ("mistral-window", {"sliding_window": None}),
        ("mistral-window", {"sliding_window": 74}),
    ],
)
def test_parity_would_fail_without_rope_scaling_or_window(family, without, make_checkpoint):
    student, architecture = load_student(make_checkpoint(family), dtype="float32")
    tokens = jnp.asarray(random_tokens(architecture, rows=1))
    other = Decoder(dataclasses.replace(architecture, **without), rngs=nnx.Rngs(0))
    nnx.update(other, nnx.state(student, nnx.Param))
    assert np.abs(np.asarray(other.logits(tokens) - student.logits(tokens))).max() > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3"])
def test_bf16_stays_as_close_to_fp32_as_transformers_does(family, make_checkpoint):
    folder = make_checkpoint(family, dtype="bfloat16")
    student, architecture = load_student(folder, dtype="bfloat16")
    assert isinstance(student, Decoder)
    assert student.head_weight().dtype == jnp.bfloat16
    tokens = random_tokens(architecture)
    exact = reference_logits(folder, tokens, "float32")
    theirs = np.sqrt(np.mean((reference_logits(folder, tokens, "bfloat16") - exact) ** 2))
    ours = np.sqrt(np.mean((np.asarray(student.logits(jnp.asarray(tokens))) - exact) ** 2))
    assert 0 < ours < 1.5 * theirs


def test_fp32_masters_with_bf16_computation_keep_fp32_parameters(make_checkpoint):
    folder = make_checkpoint("qwen2-untied")
    student, architecture = load_student(folder, dtype="bfloat16", param_dtype="float32")
    assert student.head_weight().dtype == jnp.float32
    assert student(jnp.asarray(random_tokens(architecture, rows=1))).dtype == jnp.bfloat16


@pytest.mark.parametrize("model_type", sorted(families.FAMILIES))
def test_what_a_config_leaves_out_is_what_transformers_takes(model_type: str) -> None:
    """Checkpoints of transformers have every field; those of others may not."""
    given = {"model_type": model_type, "hidden_size": 256, "num_attention_heads": 4, "vocab_size": 31}
    given |= {"intermediate_size": 20, "num_hidden_layers": 2}
    if not families.FAMILIES[model_type].kv_heads_default_to_heads:
        given["num_key_value_heads"] = 2
    theirs = transformers.AutoConfig.for_model(**given).to_dict()
    assert architecture_from_config(given) == architecture_from_config(theirs)
