import jax.numpy as jnp
import numpy as np
import pytest

from lark_jax.students.architecture import architecture_from_config
from lark_jax.students.rope import inverse_frequencies, rotate, rotation_tables

LLAMA3 = {  # Llama-3.2-1B
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def make_architecture(head_dim=64, rope_theta=500_000.0, scaling=None):
    fields = {
        "vocab_size": 11,
        "hidden_size": 2 * head_dim,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return architecture_from_config(
        {"model_type": "llama", **fields, "rope_theta": rope_theta, "rope_scaling": scaling}
    )


@pytest.mark.parametrize("head_dim", [10, 64, 128])
@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.5}, LLAMA3], ids=["none", "linear", "llama3"])
def test_inverse_frequencies_equal_those_of_transformers(head_dim, scaling):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default"} if scaling is None else {"rope_type": "linear", **scaling}
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        rope_parameters={**rope, "rope_theta": 500_000.0},
        max_position_embeddings=131_072,
    )
    embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    ours = inverse_frequencies(make_architecture(head_dim, scaling=scaling))
    assert ours.dtype == np.float32
    assert embedding.inv_freq.dtype == torch.float32
    np.testing.assert_allclose(ours, embedding.inv_freq.numpy(), rtol=1.2e-7, atol=0)  # one unit in the last place


def test_llama3_scaling_keeps_short_and_stretches_long_wavelengths():
    plain, scaled = (inverse_frequencies(make_architecture(scaling=scaling)) for scaling in (None, LLAMA3))
    wavelengths = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelengths < 8192 / 4], plain[wavelengths < 8192 / 4])
    np.testing.assert_allclose(scaled[wavelengths > 8192], plain[wavelengths > 8192] / 32, rtol=1e-6)
    between = (wavelengths > 8192 / 4) & (wavelengths < 8192)
    assert between.any()
    assert np.all((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 32))


def test_rotation_is_a_complex_product_and_precise_at_far_positions():
    architecture = make_architecture(head_dim=16, rope_theta=10_000.0)
    positions = np.array([[0, 1, 511, 32_767]])
    x = np.random.default_rng().normal(size=(1, 4, 3, 16)).astype(np.float32)
    rotated = rotate(jnp.asarray(x), *rotation_tables(architecture, jnp.asarray(positions)))
    angles = positions[0][:, None] * inverse_frequencies(architecture).astype(np.float64)
    expected = (x[..., :8] + 1j * x[..., 8:].astype(np.float64)) * np.exp(1j * angles)[None, :, None, :]
    # fp32 angles near 32,767 are spaced 2e-3 apart.
    np.testing.assert_allclose(rotated[:, :3, :, :8], expected.real[:, :3], atol=2e-4)
    np.testing.assert_allclose(rotated[:, :3, :, 8:], expected.imag[:, :3], atol=2e-4)
    np.testing.assert_allclose(rotated[..., :8], expected.real, atol=1.2e-2)


def test_scores_depend_on_distance_only():
    architecture = make_architecture(head_dim=32)
    q, k = np.random.default_rng().normal(size=(2, 1, 1, 1, 32)).astype(np.float32)

    def score(query_position, key_position):
        rotated = [
            rotate(jnp.asarray(x), *rotation_tables(architecture, jnp.asarray([[position]])))
            for x, position in ((q, query_position), (k, key_position))
        ]
        return float((rotated[0] * rotated[1]).sum())

    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=2e-3)
    assert score(7, 3) != pytest.approx(score(3, 7), abs=2e-3)
