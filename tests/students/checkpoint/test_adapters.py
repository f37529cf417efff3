"""Fresh adapters, and adapters merged into a checkpoint."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from lark_jax.config import LORA_TARGETS, MeshConfig
from lark_jax.runtime.sharding import make_mesh
from lark_jax.students import Decoder, export_adapter, export_student, load_student
from lark_jax.students.checkpoint.adapters import with_fresh_adapter
from lark_jax.students.lora import FACTOR_A, FACTOR_B, Lora, adapted_weight, factors_of, is_factor
from lark_jax.students.parameters import flatten_parameters, replace_parameters

LORA = Lora(4, 6.0, LORA_TARGETS)


def adapter_of(student: Decoder) -> dict[str, np.ndarray]:
    parameters = flatten_parameters(nnx.state(student, nnx.Param))
    return {name: np.asarray(value) for name, value in parameters.items() if is_factor(name)}


def on(student: Decoder, lora: Lora, seed: int, num_devices: int = 1) -> Decoder:
    return with_fresh_adapter(student, lora, seed, make_mesh(MeshConfig(), jax.devices()[:num_devices]))


def with_random_b(student: Decoder) -> Decoder:
    graph, state = nnx.split(student)
    rng, values = np.random.default_rng(), flatten_parameters(state)
    for name in adapter_of(student):
        if name.endswith(FACTOR_B):
            values[name] = jnp.asarray(rng.normal(scale=0.1, size=values[name].shape), jnp.float32)
    return nnx.merge(graph, replace_parameters(state, values))


def test_names_of_factors_and_weights_lead_to_each_other() -> None:
    weight = "layers.self_attn.q_proj.weight"
    a, b = factors_of(weight)
    assert (a, b) == ("layers.self_attn.q_proj.lora_A.weight", "layers.self_attn.q_proj.lora_B.weight")
    assert adapted_weight(a) == adapted_weight(b) == weight
    assert [is_factor(name) for name in (a, b, weight, "norm.weight")] == [True, True, False, False]


def test_a_fresh_adapter_is_uniform_in_a_zero_in_b_and_changes_nothing(make_checkpoint) -> None:
    student, architecture = load_student(make_checkpoint("qwen2-tied", hidden_size=240), dtype="float32")
    adapted = on(student, Lora(16, 6.0, LORA_TARGETS), seed=3)
    adapter = adapter_of(adapted)
    for name, value in adapter.items():
        assert value.dtype == np.float32
        assert value.shape[0] == architecture.num_layers
        if name.endswith(FACTOR_B):
            assert not np.any(value)
            continue
        bound = 1 / np.sqrt(value.shape[-1])
        assert 0.98 * bound < np.abs(value).max() <= bound
        # Of n draws from a uniform distribution; five standard errors.
        assert abs(value.mean()) < 5 * bound / np.sqrt(3 * value.size)
        assert abs(np.var(value) / (bound**2 / 3) - 1) < 5 * np.sqrt(0.8 / value.size)
    tokens = jnp.asarray(np.random.default_rng().integers(0, 307, (2, 20)))
    np.testing.assert_array_equal(adapted.logits(tokens), student.logits(tokens))


def test_an_adapter_depends_on_seed_and_names_but_not_on_devices_or_other_targets(make_checkpoint) -> None:
    student, _ = load_student(make_checkpoint("llama3", hidden_size=48, intermediate_size=96), dtype="float32")
    expected = adapter_of(on(student, LORA, seed=3))
    for other in (on(student, LORA, 3, num_devices=8), on(student, Lora(4, 1.0, ("q_proj", "down_proj")), 3)):
        for name, value in adapter_of(other).items():
            np.testing.assert_array_equal(value, expected[name])
    drawn = [value for name, value in expected.items() if name.endswith(FACTOR_A)]
    again = [value for name, value in adapter_of(on(student, LORA, seed=4)).items() if name.endswith(FACTOR_A)]
    assert not any(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))
    of_hidden = [value for value in drawn if value.shape[-1] == 48]
    assert len(of_hidden) == 6, "all but down_proj"
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(of_hidden, 2))


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float32", 24)])
def test_merging_rounds_once_and_leaves_other_tensors_their_bytes(dtype, bits, make_checkpoint, tmp_path) -> None:
    source = make_checkpoint("qwen2-untied", dtype=dtype, max_shard_size="50KB")
    # The parameters on the devices are rounded; those in the file are not.
    student, _ = load_student(source, dtype="bfloat16")
    lora = Lora(4, 6.0, ("q_proj", "down_proj"))
    adapted = with_random_b(on(student, lora, seed=3))
    export_student(adapted, source, tmp_path / "merged")
    export_adapter(adapted, str(source), tmp_path / "adapter")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    before, after = (tensors_in(folder) for folder in (source, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = 0
    for name, value in after.items():
        assert value.dtype == before[name].dtype
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" not in factors:
            assert value.tobytes() == before[name].tobytes(), name
            continue
        a, b = (factors[f"{layer}.lora_{letter}.weight"].astype(np.float64) for letter in "AB")
        exact = before[name].astype(np.float64) + 1.5 * (b @ a)
        # Half a unit in the last place, plus the rounding of the float32 sums.
        half_unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - bits)
        room = half_unit + 2.0**-21 * (np.abs(exact) + 1.5 * np.abs(b) @ np.abs(a))
        assert np.all(np.abs(value.astype(np.float64) - exact) <= room), name
        assert np.mean(value != before[name]) > 0.5
        changed += 1
    assert changed == 2 * 3
    assert len(factors) == 2 * changed


def tensors_in(folder) -> dict[str, np.ndarray]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_a_student_without_an_adapter_has_none_to_export(make_checkpoint, tmp_path) -> None:
    student, _ = load_student(make_checkpoint("llama3"), dtype="float32")
    with pytest.raises(ValueError, match="no adapter"):
        export_adapter(student, "base", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
